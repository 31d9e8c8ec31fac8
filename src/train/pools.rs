//! Pools of judged samples on disk, so that an evaluation that was stopped goes on where it was.
//!
//! A file is of one model at one temperature. Its first line says what made it: every setting that a sample or a verdict
//! depends on. Each further line is a task's whole pool, written as soon as it is judged, with checksums of the task's
//! prompt as tokens and of its line in the task file. A task's samples depend on nothing else, not on the other tasks
//! either, so that they are taken over exactly if all of this is the same; the file's name has a checksum of its first
//! line, and an evaluation with other settings has another file. Tasks at which a verifier's program failed, because it ended
//! or was too slow, are drawn and judged again, since what kept it may be gone; that a response cannot be judged is a verdict.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::eval::provenance::{OTHER_FIELDS, TEMPERATURE};
use crate::eval::{Judged, Provenance, Unjudged};

/// Of the lines below.
const FORMAT: u32 = 1;

/// Why a pool cannot be used.
#[derive(Debug, Error)]
pub enum PoolError {
    /// The system refuses.
    #[error("cannot use {path}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another process has it.
    #[error("{path}: another evaluation writes this pool; wait for it, or give another --output")]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// A line that no evaluation has written.
    #[error("{path}:{line}: not a line of judged samples; remove the file to draw them anew")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// A file of that name that is of other settings.
    #[error("{path} is of another evaluation than its name says; remove it")]
    Other {
        /// The file.
        path: PathBuf,
    },
}

/// The first line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Head {
    format: u32,
    samples: usize,
    settings: BTreeMap<String, String>,
}

/// What a task's samples depend on beside the settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskKey {
    /// CRC-32C of the prompt's tokens.
    pub prompt: u32,
    /// CRC-32C of the line in the task file, as JSON.
    pub line: u32,
}

/// A line of a task.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    /// Its place in the task file, from 0, which its random numbers depend on.
    task: usize,
    key: TaskKey,
    samples: Vec<Judged>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    unjudged: Vec<Unjudged>,
}

/// An open file of pools, which no other process writes meanwhile.
#[derive(Debug)]
pub struct PoolFile {
    path: PathBuf,
    file: File,
    /// Where what can be taken over begins, and its lines' number of bytes and key by task.
    kept: BTreeMap<usize, (u64, TaskKey)>,
}

impl PoolFile {
    /// Opens the file for what `provenance` says and that many samples per task in `dir`, or begins it.
    pub fn open(dir: &Path, provenance: &Provenance, samples: usize) -> Result<Self, PoolError> {
        let head = Head { format: FORMAT, samples, settings: settings(provenance) };
        let first = line_of(&head);
        let unset = String::new();
        let temperature = provenance.settings.get(TEMPERATURE).unwrap_or(&unset);
        let path = dir.join(format!("t{temperature}-{:08x}.jsonl", crc32c::crc32c(&first)));
        let error = |source| PoolError::Io { path: path.clone(), source };
        fs::create_dir_all(dir).map_err(|source| PoolError::Io { path: dir.into(), source })?;
        let mut options = OpenOptions::new();
        let mut file =
            options.read(true).write(true).create(true).truncate(false).open(&path).map_err(error)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(PoolError::Busy { path }),
            // Some network file systems have no locks.
            Err(TryLockError::Error(_)) => {}
        }
        let mut kept = BTreeMap::new();
        let mut end = 0;
        let mut reader = BufReader::new(&file);
        let mut bytes = Vec::new();
        for line in 1.. {
            bytes.clear();
            let length = reader.read_until(b'\n', &mut bytes).map_err(error)? as u64;
            // A kill leaves a last line without its end.
            if !bytes.ends_with(b"\n") {
                break;
            }
            let bad = || PoolError::Line { path: path.clone(), line };
            if line == 1 {
                let found: Head = serde_json::from_slice(&bytes).map_err(|_| bad())?;
                if found != head {
                    return Err(PoolError::Other { path });
                }
            } else {
                let Line { task, key, samples: judged, unjudged } =
                    serde_json::from_slice(&bytes).map_err(|_| bad())?;
                if judged.len() != samples {
                    return Err(bad());
                }
                if whole(&unjudged) {
                    kept.insert(task, (end, key));
                } else {
                    // An earlier line may be of another task with this number.
                    kept.remove(&task);
                }
            }
            end += length;
        }
        file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end))).map_err(error)?;
        if end == 0 {
            file.write_all(&first).map_err(error)?;
        }
        Ok(Self { path, file, kept })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tasks of `keys` whose pools are here.
    pub fn kept(&self, keys: &[TaskKey]) -> BTreeSet<usize> {
        let same = |task: &usize| self.kept.get(task).is_some_and(|(_, key)| *key == keys[*task]);
        (0..keys.len()).filter(same).collect()
    }

    /// The pool of a task that is here, and what of it could not be judged.
    pub fn read(&mut self, task: usize) -> Result<(Vec<Judged>, Vec<Unjudged>), PoolError> {
        let error = |source| PoolError::Io { path: self.path.clone(), source };
        let begin = self.kept.get(&task).map_or(u64::MAX, |(begin, _)| *begin);
        let mut reader = BufReader::new(&self.file);
        reader.seek(SeekFrom::Start(begin)).map_err(error)?;
        let mut bytes = Vec::new();
        reader.read_until(b'\n', &mut bytes).map_err(error)?;
        let line: Line = serde_json::from_slice(&bytes).map_err(|e| error(e.into()))?;
        Ok((line.samples, line.unjudged))
    }

    /// Appends a task's pool in one write.
    pub fn append(
        &mut self,
        task: usize,
        key: TaskKey,
        samples: &[Judged],
        unjudged: &[Unjudged],
    ) -> Result<(), PoolError> {
        let line = Line { task, key, samples: samples.to_vec(), unjudged: unjudged.to_vec() };
        let error = |source| PoolError::Io { path: self.path.clone(), source };
        let end = self.file.seek(SeekFrom::End(0)).map_err(error)?;
        self.file.write_all(&line_of(&line)).map_err(error)?;
        if whole(&line.unjudged) {
            self.kept.insert(task, (end, key));
        }
        Ok(())
    }

    /// Makes what was appended durable.
    pub fn sync(&self) -> Result<(), PoolError> {
        self.file.sync_data().map_err(|source| PoolError::Io { path: self.path.clone(), source })
    }
}

/// Whether verifiers did all they can.
fn whole(unjudged: &[Unjudged]) -> bool {
    !unjudged.iter().any(|response| ["timeout", "crashed", "start"].contains(&response.kind.as_str()))
}

fn line_of(record: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(record).expect("plain data");
    line.push(b'\n');
    line
}

/// The settings that samples and verdicts depend on: without names of what is known by its contents, without what says how
/// fast verifiers are, and without what a task's own key covers.
fn settings(provenance: &Provenance) -> BTreeMap<String, String> {
    let mut settings = provenance.settings.clone();
    settings.retain(|key, _| {
        let section = key.split('.').next().unwrap_or(key);
        // Of a task's tests a program that is too slow fails them; of other verifiers' it is another who is slow.
        let judged =
            provenance.settings.get(&format!("{section}.kind")).is_some_and(|kind| kind.contains("program"));
        let speed = key.ends_with(".timeout_seconds") && !judged || key.ends_with(".workers");
        !speed && !["model", "data.tasks", OTHER_FIELDS].contains(&key.as_str())
    });
    settings
}
