//! Files that results depend on and that neither tasks nor checkpoints hold: their checksums, by the setting that names them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::config::TrainConfig;
use crate::checkpoint::Checkpoint;
use crate::verifier::VerifierConfig;

/// What verifier and environment read: `verifier.weights` of a reward model, `verifier_files.FILE` of each file that a
/// command names (the script beside its interpreter). What cannot be read is left out, because the verifier itself tells of it.
pub fn of_verifiers(config: &TrainConfig) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for (section, verifier) in [("verifier", &config.verifier), ("environment", &config.environment)] {
        // Another model in the same place is another measure.
        if let Some(sum) = verifier.as_ref().and_then(VerifierConfig::model).and_then(weights) {
            all.insert(format!("{section}.weights"), sum);
        }
        let Some(VerifierConfig::Command { program, .. }) = verifier else { continue };
        for file in program.iter().filter(|word| Path::new(word).is_file()) {
            if let Ok(bytes) = fs::read(file) {
                all.insert(format!("{section}_files.{file}"), crc(crc32c::crc32c(&bytes)));
            }
        }
    }
    all
}

/// What a run's steps read: [`of_verifiers`], and `model.weights` of the start where a checkpoint does not replace it: under
/// adapters, and as what a KL term compares with.
pub fn of_steps(config: &TrainConfig) -> BTreeMap<String, String> {
    let mut all = of_verifiers(config);
    if config.relies_on_start()
        && let Some(sum) = weights(&config.model.path)
    {
        all.insert("model.weights".to_owned(), sum);
    }
    all
}

/// The checksum of all tensors of a checkpoint, if there is one.
fn weights(path: &Path) -> Option<String> {
    let checkpoint = Checkpoint::open(path).ok()?;
    let tensors = checkpoint.names().filter_map(|name| checkpoint.tensor(name));
    Some(crc(tensors.fold(0, |sum, tensor| crc32c::crc32c_append(sum, tensor.bytes))))
}

/// A checksum as reports have it.
pub(super) fn crc(value: u32) -> String {
    format!("crc32c {value:08x}")
}
