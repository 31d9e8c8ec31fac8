use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::atomic::write_new;
use super::{Action, FileError, INDEX_FILE, WEIGHTS_FILE};

/// Hugging Face's customary shard size, in bytes of tensors.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name; names must differ.
    pub name: String,
    /// Storage type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes tensors into `dir` (inside [`super::atomic::replace_dir`]): `model.safetensors` if they fit into
/// `max_shard_bytes`, else `model-00001-of-0000N.safetensors`... and an index. `bytes(i)` gives tensor i's
/// row-major little-endian elements when its turn comes, so that no second copy of all weights ever exists.
///
/// Panics if `bytes` gives another length than the spec says.
pub fn write_tensors<'a>(
    dir: &Path,
    specs: &[TensorSpec],
    max_shard_bytes: u64,
    mut bytes: impl FnMut(usize) -> Cow<'a, [u8]>,
) -> Result<(), FileError> {
    let mut shards: Vec<Vec<usize>> = vec![Vec::new()];
    let mut used = 0;
    for (i, spec) in specs.iter().enumerate() {
        let size = spec.bytes() as u64;
        if used > 0 && used + size > max_shard_bytes {
            shards.push(Vec::new());
            used = 0;
        }
        used += size;
        shards.last_mut().expect("starts with one").push(i);
    }

    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    for (number, mut members) in shards.into_iter().enumerate() {
        let name = match count {
            1 => WEIGHTS_FILE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        weight_map.extend(members.iter().map(|&i| (specs[i].name.as_str(), name.clone())));
        // Widest elements first: so every tensor lies aligned to its element.
        members.sort_by_key(|&i| std::cmp::Reverse(specs[i].dtype.bitsize()));
        let path = dir.join(name);
        File::create_new(&path)
            .and_then(|file| write_shard(file, specs, &members, &mut bytes))
            .map_err(FileError::io(Action::Write, &path))?;
    }
    if count > 1 {
        let total: usize = specs.iter().map(TensorSpec::bytes).sum();
        let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        write_new(&dir.join(INDEX_FILE), format!("{index:#}\n").as_bytes())?;
    }
    Ok(())
}

/// Writes tensors as one new file; see [`write_tensors`].
pub fn write_file_of<'a>(
    path: &Path,
    specs: &[TensorSpec],
    mut bytes: impl FnMut(usize) -> Cow<'a, [u8]>,
) -> Result<(), FileError> {
    let members: Vec<usize> = (0..specs.len()).collect();
    File::create_new(path)
        .and_then(|file| write_shard(file, specs, &members, &mut bytes))
        .map_err(FileError::io(Action::Write, path))
}

fn write_shard<'a>(
    file: File,
    specs: &[TensorSpec],
    members: &[usize],
    bytes: &mut impl FnMut(usize) -> Cow<'a, [u8]>,
) -> io::Result<()> {
    let mut offset = 0;
    let infos = members.iter().map(|&i| {
        let TensorSpec { name, dtype, shape } = &specs[i];
        let data_offsets = (offset, offset + specs[i].bytes());
        offset = data_offsets.1;
        (name.clone(), TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets })
    });
    // Transformers refuses a file that does not say which framework's layout it has.
    let layout = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(layout), infos.collect()).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&metadata)?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for &i in members {
        let data = bytes(i);
        assert_eq!(data.len(), specs[i].bytes(), "bytes of {}", specs[i].name);
        out.write_all(&data)?;
    }
    out.flush()
}
