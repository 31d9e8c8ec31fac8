//! Bytes on disk <-> named tensors, in Hugging Face's layout: one `model.safetensors`, or shards with
//! `model.safetensors.index.json`. Knows no model.
//!
//! Files are mapped, not read, and must not change while a [`Checkpoint`] lives; the engine itself never writes in
//! place ([`atomic`]).

pub mod atomic;
mod read;
mod write;

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub use read::{Checkpoint, CheckpointError, Mapped, TensorView};
pub use safetensors::Dtype;
pub use write::{MAX_SHARD_BYTES, TensorSpec, write_file_of, write_tensors};

/// The weights of an unsharded checkpoint.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The table of a sharded checkpoint: which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// What was being done to a file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Opening or reading.
    Read,
    /// Creating, writing, syncing or renaming into place.
    Write,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Action::Read => "read",
            Action::Write => "write",
        })
    }
}

/// Why a file or directory cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system refused.
    #[error("cannot {action} {}{}", path.display(), next_step(*action, source))]
    Io {
        /// Reading or writing.
        action: Action,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A directory, pipe or device stands where a file is needed.
    #[error("cannot read {}: not a regular file", path.display())]
    NotAFile {
        /// What was found.
        path: PathBuf,
    },
    /// Far larger than such a file ever is.
    #[error("cannot read {}: {size} bytes, and such a file has at most {limit}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The most that is read.
        limit: u64,
    },
    /// The path cannot name a new directory: `/`, `..`, a file or a link.
    #[error("cannot write {}: {problem}", path.display())]
    Target {
        /// Where the directory was to stand.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The directory to be replaced holds something that its replacement does not: replacing it would lose that.
    #[error("cannot replace {}: it holds {entry:?}, which the new version does not; move that away, or choose \
             another directory", path.display())]
    WouldLose {
        /// The directory.
        path: PathBuf,
        /// The first such entry, by name.
        entry: String,
    },
}

fn next_step(action: Action, source: &io::Error) -> &'static str {
    match (action, source.kind()) {
        (_, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            " (nothing was replaced; free some space or choose another directory)"
        }
        (_, io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) => {
            " (check the permissions or choose another directory)"
        }
        (Action::Write, io::ErrorKind::NotFound) => " (create the directory that is to hold it)",
        _ => "",
    }
}

impl FileError {
    /// For `map_err`: the action and path that an [`io::Error`] lacks.
    pub fn io(action: Action, path: &Path) -> impl FnOnce(io::Error) -> FileError + use<> {
        let path = path.to_owned();
        move |source| FileError::Io { action, path, source }
    }
}

/// Opens a regular file for reading and gives its size. Pipes are refused before they can block.
fn open_file(path: &Path) -> Result<(std::fs::File, u64), FileError> {
    let meta = std::fs::metadata(path).map_err(FileError::io(Action::Read, path))?;
    if !meta.is_file() {
        return Err(FileError::NotAFile { path: path.to_owned() });
    }
    let file = std::fs::File::open(path).map_err(FileError::io(Action::Read, path))?;
    Ok((file, meta.len()))
}

/// A text without the byte order mark with which some editors begin UTF-8 files: it is no part of any text.
pub fn without_bom(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)
}

/// Reads a regular file of at most `limit` bytes, so that a hostile or mistaken path cannot exhaust memory. A byte order
/// mark is left out.
pub fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let (file, size) = open_file(path)?;
    if size > limit {
        return Err(FileError::TooLarge { path: path.to_owned(), size, limit });
    }
    let mut bytes = Vec::with_capacity(size as usize);
    file.take(limit).read_to_end(&mut bytes).map_err(FileError::io(Action::Read, path))?;
    bytes.drain(..bytes.len() - without_bom(&bytes).len());
    Ok(bytes)
}
