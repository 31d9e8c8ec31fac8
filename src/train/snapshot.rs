//! Training checkpoints: `checkpoints/step-000123/` with the model as Hugging Face lays it out (`model/`), AdamW's
//! moments and master weights (`optimizer.safetensors`), the counters (`state.json`) and `manifest.json`.
//!
//! A kill at any moment leaves a usable newest checkpoint. A checkpoint is written in a `.partial-` directory: its
//! files first, then the manifest with all their sizes and checksums, each synced to disk; then one rename puts it
//! in place, and only after that are older ones removed, each renamed to `.trash-` first so that a half-removed one
//! never looks whole. [`Snapshots::open`] clears away what a kill left behind. A checkpoint in which somebody else has
//! put a file stays.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensorError, SafeTensors, View};
use serde::{Deserialize, Serialize};
use thiserror::Error;

const MODEL: &str = "model";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const MANIFEST: &str = "manifest.json";
/// The name of the file that is locked.
pub const LOCK: &str = ".lock";
/// What the lock's file says: the sign that a run has begun here.
const LOCK_TEXT: &str = "bon-engine train\n";
const PREFIX: &str = "step-";
const PARTIAL: &str = ".partial-";
const TRASH: &str = ".trash-";
/// Version of the layout of `manifest.json` and `state.json`.
const FORMAT: u32 = 2;

/// Everything of a run but its arrays and its configuration. Random numbers are counter-based and have no state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Steps completed.
    pub step: u64,
    /// [`super::config::TrainConfig::resume_hash`].
    pub config_hash: u32,
    /// [`crate::tasks::Tasks::fingerprint`].
    pub data_hash: u32,
    /// What computed: see [`crate::backend::Platform::device_model`].
    pub device: String,
    /// [`super::inputs::of_steps`]; empty in checkpoints of earlier versions.
    #[serde(default)]
    pub inputs: BTreeMap<String, String>,
}

/// A checkpoint whose files have all been found as they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its directory.
    pub path: PathBuf,
    /// Its counters.
    pub state: TrainState,
}

impl Snapshot {
    /// The model's directory, in Hugging Face's layout.
    pub fn model_dir(&self) -> PathBuf {
        self.path.join(MODEL)
    }

    /// The optimizer's arrays, for [`Arrays::open`].
    pub fn optimizer_path(&self) -> PathBuf {
        self.path.join(OPTIMIZER)
    }
}

/// What [`newest_valid`] found.
#[derive(Debug, Default)]
pub struct Newest {
    /// The newest checkpoint that is whole. `None` with an empty `passed_over`: there is none at all. `None` with
    /// some passed over: all are damaged, and to begin anew is for the user to decide.
    pub snapshot: Option<Snapshot>,
    /// Newer checkpoints that are damaged, newest first: the directory and what is wrong with it.
    pub passed_over: Vec<(PathBuf, SnapshotError)>,
}

/// What the caller's own writers fail with.
pub type WriteError = Box<dyn Error + Send + Sync>;

/// Why a checkpoint cannot be written or read.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The system refuses.
    #[error("cannot {doing} {path}")]
    Io {
        /// "write", "rename", ...
        doing: &'static str,
        /// File or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A checkpoint could not be completed. It has been removed again.
    #[error("cannot save {path}; earlier checkpoints are untouched")]
    Save {
        /// Where it was to lie.
        path: PathBuf,
        /// What failed.
        source: Box<SnapshotError>,
    },
    /// The writer of the model or of the optimizer's arrays failed.
    #[error("cannot write {path}")]
    Content {
        /// File or directory.
        path: PathBuf,
        /// The writer's error.
        source: WriteError,
    },
    /// Another process holds the directory.
    #[error("{path} is in use by another training process; stop it, or choose another output directory")]
    Locked {
        /// The directory of checkpoints.
        path: PathBuf,
    },
    /// A file is not what was written.
    #[error("{path}: {problem}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of arrays that cannot be written, or holds no safetensors.
    #[error("cannot read or write {path} as safetensors")]
    Arrays {
        /// The file.
        path: PathBuf,
        /// The format's reason.
        source: SafeTensorError,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    /// In order of path.
    files: Vec<ManifestEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestEntry {
    /// Relative to the checkpoint, with `/`.
    path: String,
    bytes: u64,
    crc32c: u32,
}

/// The checkpoints of one run, open for writing. Holds a lock on the directory.
#[derive(Debug)]
pub struct Snapshots {
    dir: PathBuf,
    keep: usize,
    lock: File,
}

impl Drop for Snapshots {
    fn drop(&mut self) {
        // Closing the file would not do: a child between fork and exec has it open as well, and so holds the lock. That
        // it cannot be given back is no news: it goes with the process.
        let _ = self.lock.unlock();
    }
}

impl Snapshots {
    /// Opens (or makes) a directory of checkpoints of which the newest `keep` (at least 1) are to stay, and clears
    /// away what a killed process left: unfinished checkpoints, half-removed ones.
    pub fn open(dir: &Path, keep: usize) -> Result<Self, SnapshotError> {
        op("create", dir, |p| fs::create_dir_all(p))?;
        let path = dir.join(LOCK);
        let lock = op("open", &path, |p| File::options().create(true).append(true).open(p))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(SnapshotError::Locked { path: dir.into() }),
            Err(TryLockError::Error(source)) => {
                return Err(SnapshotError::Io { doing: "lock", path, source });
            }
        }
        if !begun(dir) {
            op("write", &path, |p| fs::write(p, LOCK_TEXT))?;
        }
        let snapshots = Self { dir: dir.into(), keep: keep.max(1), lock };
        // Partial ones first: while a step is saved anew, its former checkpoint may lie in the trash.
        for (name, path) in entries(dir)? {
            let Some(name) = name.strip_prefix(PARTIAL) else { continue };
            let place = dir.join(name);
            if !place.exists() && verify(&path).is_ok() {
                // Killed between the manifest and the rename: nothing is missing but the name.
                op("rename", &path, |p| fs::rename(p, &place))?;
                sync_dir(dir)?;
            } else {
                op("remove", &path, |p| fs::remove_dir_all(p))?;
            }
        }
        snapshots.empty_trash()?;
        Ok(snapshots)
    }

    /// [`newest_valid`] of this directory.
    pub fn newest_valid(&self) -> Result<Newest, SnapshotError> {
        newest_valid(&self.dir)
    }

    /// Saves a checkpoint of `state.step`, in the place of one of the same step; then removes the oldest beyond
    /// those to keep, and those of later steps, which a run that went back to an earlier one has left behind.
    ///
    /// `write_model` makes the directory it is given and saves the model there; `write_optimizer` writes the file it
    /// is given (see [`write_arrays`]). On failure earlier checkpoints are as they were.
    pub fn save(
        &self,
        state: &TrainState,
        write_model: impl FnOnce(&Path) -> Result<(), WriteError>,
        write_optimizer: impl FnOnce(&Path) -> Result<(), WriteError>,
    ) -> Result<PathBuf, SnapshotError> {
        let name = name_of(state.step);
        let place = self.dir.join(&name);
        let partial = self.dir.join(format!("{PARTIAL}{name}"));
        let written = write(&partial, state, write_model, write_optimizer);
        if let Err(e) = written.and_then(|()| self.put_in_place(&name, &partial, &place)) {
            // Best effort: the error to report is the first one, and the next start clears it away as well.
            let _ = fs::remove_dir_all(&partial);
            return Err(SnapshotError::Save { path: place, source: Box::new(e) });
        }
        self.prune(state.step)?;
        Ok(place)
    }

    fn put_in_place(&self, name: &str, partial: &Path, place: &Path) -> Result<(), SnapshotError> {
        let former = self.dir.join(format!("{TRASH}{name}"));
        let replaces = place.exists();
        if replaces {
            op("rename", place, |p| fs::rename(p, &former))?;
        }
        op("rename", partial, |p| fs::rename(p, place)).inspect_err(|_| {
            if replaces {
                let _ = fs::rename(&former, place);
            }
        })?;
        sync_dir(&self.dir)
    }

    fn prune(&self, newest: u64) -> Result<(), SnapshotError> {
        let all = list(&self.dir)?;
        let later = all.iter().filter(|(step, _)| *step > newest);
        let oldest = all.iter().filter(|(step, _)| *step <= newest).skip(self.keep);
        for (_, path) in later.chain(oldest) {
            // What others have put there, or made by hand under such a name, is not ours to remove.
            if !all_written(path)? {
                continue;
            }
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let trash = self.dir.join(format!("{TRASH}{name}"));
            op("rename", path, |p| fs::rename(p, &trash))?;
        }
        // Without this the removals could reach the disk before the renames do.
        sync_dir(&self.dir)?;
        self.empty_trash()
    }

    fn empty_trash(&self) -> Result<(), SnapshotError> {
        for (name, path) in entries(&self.dir)? {
            if name.starts_with(TRASH) {
                op("remove", &path, |p| fs::remove_dir_all(p))?;
            }
        }
        Ok(())
    }
}

/// Whether a run has begun in `dir`, with or without a checkpoint.
pub fn begun(dir: &Path) -> bool {
    fs::read(dir.join(LOCK)).is_ok_and(|text| text == LOCK_TEXT.as_bytes())
}

/// The step of the newest checkpoint in `dir`, whole or not.
pub fn newest_step(dir: &Path) -> Result<Option<u64>, SnapshotError> {
    if !dir.is_dir() {
        return Ok(None);
    }
    Ok(list(dir)?.first().map(|(step, _)| *step))
}

/// Whether the checkpoint at `path` holds nothing but files that its manifest lists.
fn all_written(path: &Path) -> Result<bool, SnapshotError> {
    fn only(listed: &BTreeSet<String>, dir: &Path, prefix: &str) -> Result<bool, SnapshotError> {
        for (name, path) in entries(dir)? {
            let name = format!("{prefix}{name}");
            let ours = if path.is_dir() {
                only(listed, &path, &format!("{name}/"))?
            } else {
                listed.contains(&name)
            };
            if !ours {
                return Ok(false);
            }
        }
        Ok(true)
    }
    let manifest = path.join(MANIFEST);
    if !manifest.is_file() {
        return Ok(false);
    }
    let Manifest { files, .. } = match read_json(&manifest) {
        Err(SnapshotError::Damaged { .. }) => return Ok(false),
        read => read?,
    };
    let mut listed: BTreeSet<String> = files.into_iter().map(|entry| entry.path).collect();
    listed.insert(MANIFEST.to_owned());
    only(&listed, path, "")
}

/// The newest checkpoint in `dir` that is whole, going back over damaged ones. Reads every byte of it. A missing
/// `dir` holds none.
pub fn newest_valid(dir: &Path) -> Result<Newest, SnapshotError> {
    let mut found = Newest::default();
    if !dir.exists() {
        return Ok(found);
    }
    for (step, path) in list(dir)? {
        let checked = verify(&path).and_then(|snapshot| match snapshot.state.step {
            s if s == step => Ok(snapshot),
            s => {
                Err(damaged(&path.join(STATE), format!("is of step {s}, which the directory's name is not")))
            }
        });
        match checked {
            Ok(snapshot) => {
                found.snapshot = Some(snapshot);
                break;
            }
            Err(e) => found.passed_over.push((path, e)),
        }
    }
    Ok(found)
}

/// Checks every file of the checkpoint at `path` against its manifest, sizes and checksums, and reads its state.
pub fn verify(path: &Path) -> Result<Snapshot, SnapshotError> {
    let manifest_path = path.join(MANIFEST);
    let manifest: Manifest = read_json(&manifest_path)?;
    if manifest.format != FORMAT {
        let problem = format!("has format {}; this version reads {FORMAT}", manifest.format);
        return Err(damaged(&manifest_path, problem));
    }
    // Sizes cost nothing and find most damage.
    for entry in &manifest.files {
        let file = path.join(&entry.path);
        let bytes = op("read", &file, |p| fs::metadata(p))?.len();
        if bytes != entry.bytes {
            return Err(damaged(&file, format!("has {bytes} bytes, {} were written", entry.bytes)));
        }
    }
    for entry in &manifest.files {
        let file = path.join(&entry.path);
        let (_, crc) = checksum(&file, false)?;
        if crc != entry.crc32c {
            let problem = format!("has CRC-32C {crc:08x}, {:08x} was written", entry.crc32c);
            return Err(damaged(&file, problem));
        }
    }
    if !manifest.files.iter().any(|entry| entry.path == STATE) {
        return Err(damaged(&manifest_path, format!("does not list {STATE}")));
    }
    Ok(Snapshot { path: path.into(), state: read_json(&path.join(STATE))? })
}

/// Writes a whole checkpoint to `partial`, durably, the manifest last.
fn write(
    partial: &Path,
    state: &TrainState,
    write_model: impl FnOnce(&Path) -> Result<(), WriteError>,
    write_optimizer: impl FnOnce(&Path) -> Result<(), WriteError>,
) -> Result<(), SnapshotError> {
    if partial.exists() {
        op("remove", partial, |p| fs::remove_dir_all(p))?;
    }
    op("create", partial, |p| fs::create_dir(p))?;
    let content = |path: &Path, written: Result<(), WriteError>| {
        written.map_err(|source| SnapshotError::Content { path: path.into(), source })
    };
    let path = partial.join(MODEL);
    content(&path, write_model(&path))?;
    let path = partial.join(OPTIMIZER);
    content(&path, write_optimizer(&path))?;
    write_json(&partial.join(STATE), state)?;

    let mut files = Vec::new();
    seal(partial, "", &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let path = partial.join(MANIFEST);
    write_json(&path, &Manifest { format: FORMAT, files })?;
    op("sync", &path, |p| File::open(p)?.sync_all())?;
    sync_dir(partial)
}

/// Syncs every file and directory under `dir` to disk and lists the files.
fn seal(dir: &Path, prefix: &str, files: &mut Vec<ManifestEntry>) -> Result<(), SnapshotError> {
    for (name, path) in entries(dir)? {
        let relative = format!("{prefix}{name}");
        if path.is_dir() {
            seal(&path, &format!("{relative}/"), files)?;
        } else {
            let (bytes, crc32c) = checksum(&path, true)?;
            files.push(ManifestEntry { path: relative, bytes, crc32c });
        }
    }
    sync_dir(dir)
}

/// Size and CRC-32C of a file, after an fsync where `sync` says so.
fn checksum(path: &Path, sync: bool) -> Result<(u64, u32), SnapshotError> {
    op("read", path, |p| {
        let mut file = File::open(p)?;
        if sync {
            file.sync_all()?;
        }
        let mut buffer = vec![0; 1 << 20];
        let (mut bytes, mut crc) = (0, 0);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok((bytes, crc)),
                n => {
                    bytes += n as u64;
                    crc = crc32c::crc32c_append(crc, &buffer[..n]);
                }
            }
        }
    })
}

/// The name of a step's checkpoint.
fn name_of(step: u64) -> String {
    format!("{PREFIX}{step:06}")
}

/// The checkpoints in `dir` by step, newest first, whole or not.
fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, SnapshotError> {
    let mut all: Vec<(u64, PathBuf)> = entries(dir)?
        .into_iter()
        .filter_map(|(name, path)| {
            let step: u64 = name.strip_prefix(PREFIX)?.parse().ok()?;
            (name == name_of(step)).then_some((step, path))
        })
        .collect();
    all.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    Ok(all)
}

/// Names and paths in a directory, in order of name.
fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>, SnapshotError> {
    op("read", dir, |p| {
        let mut found = Vec::new();
        for entry in fs::read_dir(p)? {
            let entry = entry?;
            found.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
        found.sort();
        Ok(found)
    })
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), SnapshotError> {
    op("write", path, |p| {
        let mut file = File::create(p)?;
        serde_json::to_writer(&mut file, value)?;
        file.flush()
    })
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, SnapshotError> {
    let text = op("read", path, |p| fs::read(p))?;
    serde_json::from_slice(&text).map_err(|e| damaged(path, e.to_string()))
}

fn sync_dir(dir: &Path) -> Result<(), SnapshotError> {
    op("sync", dir, |p| File::open(p)?.sync_all())
}

fn damaged(path: &Path, problem: String) -> SnapshotError {
    SnapshotError::Damaged { path: path.into(), problem }
}

/// One operation on the file system, with an error that says which. All go through here, so that tests can fail or
/// crash before any of them.
fn op<T>(
    doing: &'static str,
    path: &Path,
    f: impl FnOnce(&Path) -> io::Result<T>,
) -> Result<T, SnapshotError> {
    #[cfg(test)]
    let f = |path: &Path| tests::boundary().and_then(|()| f(path));
    f(path).map_err(|source| SnapshotError::Io { doing, path: path.into(), source })
}

/// An f32 matrix to be written: its bytes are asked for when its turn comes, so that of a large state only one array
/// is in memory twice.
pub struct Array<'a> {
    dtype: Dtype,
    shape: [usize; 2],
    bytes: Box<dyn Fn() -> Cow<'a, [u8]> + 'a>,
}

impl<'a> Array<'a> {
    /// A `[rows, cols]` matrix; `bytes` gives its elements, row-major and little-endian.
    pub fn new(dtype: Dtype, rows: usize, cols: usize, bytes: impl Fn() -> Cow<'a, [u8]> + 'a) -> Self {
        Self { dtype, shape: [rows, cols], bytes: Box::new(bytes) }
    }
}

impl View for Array<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = (self.bytes)();
        assert_eq!(bytes.len(), self.data_len(), "an array gave more or fewer bytes than its shape says");
        bytes
    }

    fn data_len(&self) -> usize {
        self.shape[0] * self.shape[1] * self.dtype.bitsize() / 8
    }
}

/// Writes named arrays to a safetensors file. Panics if an array's bytes are not what its shape says.
pub fn write_arrays<'a>(
    path: &Path,
    arrays: impl IntoIterator<Item = (String, Array<'a>)>,
) -> Result<(), SnapshotError> {
    safetensors::serialize_to_file(arrays, None, path)
        .map_err(|source| SnapshotError::Arrays { path: path.into(), source })
}

/// A file of arrays, mapped into memory.
#[derive(Debug)]
pub struct Arrays {
    path: PathBuf,
    map: memmap2::Mmap,
}

impl Arrays {
    /// Maps the file and checks its header.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let file = op("open", path, |p| File::open(p))?;
        // SAFETY: the bytes must not change while they are mapped. A checkpoint's files are never written to again
        // once it has its name, and a removed file stays mapped.
        let map = op("map", path, |_| unsafe { memmap2::Mmap::map(&file) })?;
        let arrays = Self { path: path.into(), map };
        arrays.tensors()?;
        Ok(arrays)
    }

    /// The bytes of array `name`, which must be `dtype` `[rows, cols]`: row-major and little-endian.
    pub fn bytes(&self, name: &str, dtype: Dtype, rows: usize, cols: usize) -> Result<&[u8], SnapshotError> {
        let tensor = self.tensors()?.tensor(name).map_err(|source| self.error(source))?;
        if tensor.dtype() != dtype || tensor.shape() != [rows, cols] {
            let (found, shape) = (tensor.dtype(), tensor.shape());
            let problem = format!("`{name}` is {found} {shape:?}; the model needs {dtype} [{rows}, {cols}]");
            return Err(damaged(&self.path, problem));
        }
        Ok(tensor.data())
    }

    fn tensors(&self) -> Result<SafeTensors<'_>, SnapshotError> {
        SafeTensors::deserialize(&self.map).map_err(|source| self.error(source))
    }

    fn error(&self, source: SafeTensorError) -> SnapshotError {
        SnapshotError::Arrays { path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// What happens before a file operation once the countdown has run out.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fault {
        /// The process is gone: nothing after this runs, no cleaning up either.
        Crash,
        /// The disk is full for this one operation.
        Full,
    }

    struct Crashed;

    thread_local! {
        static FAULT: Cell<Option<(Fault, usize)>> = const { Cell::new(None) };
    }

    pub(super) fn boundary() -> io::Result<()> {
        match FAULT.get() {
            Some((Fault::Crash, 0)) => {
                FAULT.set(None);
                std::panic::resume_unwind(Box::new(Crashed));
            }
            Some((Fault::Full, 0)) => {
                FAULT.set(None);
                Err(io::ErrorKind::StorageFull.into())
            }
            Some((fault, n)) => {
                FAULT.set(Some((fault, n - 1)));
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn state(step: u64) -> TrainState {
        TrainState { step, config_hash: 2, data_hash: 3, device: "cpu".into(), inputs: BTreeMap::new() }
    }

    /// A save with contents that tell its step and `tag`, in pieces with a boundary before each.
    fn save(snapshots: &Snapshots, step: u64, tag: &str) -> Result<PathBuf, SnapshotError> {
        let text = format!("{step} {tag}");
        snapshots.save(
            &state(step),
            |dir| {
                boundary()?;
                fs::create_dir(dir)?;
                let mut file = File::create(dir.join("model.safetensors"))?;
                for piece in [&text[..1], &text[1..]] {
                    boundary()?;
                    file.write_all(piece.as_bytes())?;
                }
                Ok(())
            },
            |path| {
                boundary()?;
                Ok(fs::write(path, &text)?)
            },
        )
    }

    fn contents(snapshot: &Snapshot) -> String {
        let model = fs::read_to_string(snapshot.model_dir().join("model.safetensors")).unwrap();
        assert_eq!(model, fs::read_to_string(snapshot.optimizer_path()).unwrap());
        assert_eq!(snapshot.state, state(model.split(' ').next().unwrap().parse().unwrap()));
        model
    }

    fn names(dir: &Path) -> Vec<String> {
        entries(dir).unwrap().into_iter().map(|(name, _)| name).filter(|name| name != LOCK).collect()
    }

    fn newest(dir: &Path) -> String {
        let newest = newest_valid(dir).unwrap();
        assert!(newest.passed_over.is_empty(), "{:?}", newest.passed_over);
        contents(&newest.snapshot.expect("a checkpoint is left"))
    }

    /// Saves `step` over and over, each time with the fault one operation later, until a save gets through.
    /// Calls `check` with what was saved before, and returns the number of operations.
    fn at_every_operation(fault: Fault, step: u64, check: impl Fn(&Path, bool)) -> usize {
        for n in 0.. {
            let dir = tempfile::tempdir().unwrap();
            // Keeping a single checkpoint leaves the least to fall back on.
            let snapshots = Snapshots::open(dir.path(), 1).unwrap();
            save(&snapshots, 1, "old").unwrap();
            FAULT.set(Some((fault, n)));
            let saved = catch_unwind(AssertUnwindSafe(|| save(&snapshots, step, "new")));
            let unused = FAULT.take().is_some();
            drop(snapshots);
            match saved {
                Ok(Ok(_)) => assert!(unused, "operation {n} failed and the save says nothing"),
                Ok(Err(_)) => assert_eq!(fault, Fault::Full),
                Err(payload) => assert!(payload.is::<Crashed>()),
            }
            check(dir.path(), unused);
            if unused {
                return n;
            }
        }
        unreachable!()
    }

    #[test]
    fn a_kill_before_any_operation_leaves_a_whole_checkpoint() {
        for step in [1, 2] {
            let new = format!("{step} new");
            let was_new = Cell::new(false);
            let operations = at_every_operation(Fault::Crash, step, |dir, finished| {
                let snapshots = Snapshots::open(dir, 1).unwrap();
                let found = newest(dir);
                assert!(found == "1 old" || found == new, "{found}");
                // From the rename on it is the new one, and never the old one again.
                assert!(!was_new.get() || found == new);
                assert!(!finished || found == new);
                was_new.set(found == new);
                assert!(names(dir).iter().all(|name| name.starts_with(PREFIX)), "{:?}", names(dir));
                save(&snapshots, 3, "next").unwrap();
                assert_eq!(names(dir), ["step-000003"]);
                assert_eq!(newest(dir), "3 next");
            });
            assert!(operations > 15, "only {operations} operations were seen");
        }
    }

    #[test]
    fn a_kill_while_a_start_clears_up_loses_nothing_either() {
        // The saves killed at each operation, then starts killed at each of theirs.
        for step in [1, 2] {
            at_every_operation(Fault::Crash, step, |dir, _| {
                for n in 0.. {
                    FAULT.set(Some((Fault::Crash, n)));
                    let opened = catch_unwind(|| Snapshots::open(dir, 1).map(drop));
                    FAULT.set(None);
                    if let Ok(opened) = opened {
                        opened.unwrap();
                        break;
                    }
                }
                newest(dir);
            });
        }
    }

    #[test]
    fn a_full_disk_is_named_and_earlier_checkpoints_survive() {
        for step in [1, 2] {
            at_every_operation(Fault::Full, step, |dir, _| {
                let found = newest(dir);
                assert!(found == "1 old" || found == format!("{step} new"), "{found}");
                assert!(!names(dir).iter().any(|name| name.starts_with(PARTIAL)), "{:?}", names(dir));
            });
        }
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::open(dir.path(), 1).unwrap();
        FAULT.set(Some((Fault::Full, 3)));
        let error = save(&snapshots, 1, "").unwrap_err();
        let chain = [error.source(), error.source().and_then(|e| e.source())].map(|e| e.unwrap().to_string());
        assert!(error.to_string().ends_with("earlier checkpoints are untouched"), "{error}");
        assert!(chain[0].ends_with(".partial-step-000001/model"), "{chain:?}");
        assert_eq!(chain[1], io::Error::from(io::ErrorKind::StorageFull).to_string());
    }

    #[test]
    fn the_newest_are_kept_and_an_abandoned_future_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::open(dir.path(), 2).unwrap();
        for step in [5, 10, 15, 1_000_000] {
            save(&snapshots, step, "").unwrap();
        }
        assert_eq!(names(dir.path()), ["step-000015", "step-1000000"]);
        fs::remove_file(dir.path().join("step-1000000").join(OPTIMIZER)).unwrap();
        save(&snapshots, 20, "").unwrap();
        assert_eq!(names(dir.path()), ["step-000015", "step-000020"]);
    }

    #[test]
    fn one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = Snapshots::open(dir.path(), 1).unwrap();
        assert!(matches!(Snapshots::open(dir.path(), 1), Err(SnapshotError::Locked { .. })));
        drop(first);
        Snapshots::open(dir.path(), 1).unwrap();
    }

    /// A child that another thread is about to exec has all that is open here.
    #[test]
    fn the_lock_goes_though_a_child_has_its_file_open() {
        let dir = tempfile::tempdir().unwrap();
        let first = Snapshots::open(dir.path(), 1).unwrap();
        let inherited = first.lock.try_clone().unwrap();
        drop(first);
        Snapshots::open(dir.path(), 1).unwrap();
        drop(inherited);
    }

    #[test]
    fn what_others_put_beside_checkpoints_stays() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::open(dir.path(), 1).unwrap();
        save(&snapshots, 1, "").unwrap();
        // Names that no save gives, a directory that none made, a file in one that a save made.
        for name in ["step-1", "step-0000007", "step-000009"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("mine"), "").unwrap();
        }
        fs::write(dir.path().join("step-000001/model/mine.gguf"), "").unwrap();
        for step in [2, 3, 4] {
            save(&snapshots, step, "").unwrap();
        }
        assert_eq!(
            names(dir.path()),
            ["step-0000007", "step-000001", "step-000004", "step-000009", "step-1"]
        );
        assert!(dir.path().join("step-000001/model/mine.gguf").exists());
    }
}
