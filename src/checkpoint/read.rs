use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::{Action, FileError, INDEX_FILE, WEIGHTS_FILE, open_file, read_file};

/// An index holds one short line per tensor; the largest public ones have a few MB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// safetensors' own limit on its header.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Why a checkpoint cannot be opened. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The directory holds no safetensors.
    #[error("{}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there; convert other formats to safetensors first",
            dir.display())]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// The lengths in a safetensors file contradict each other.
    #[error("{}: not a whole safetensors file ({problem}); it is damaged or its download stopped early",
            path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Which lengths.
        problem: String,
    },
    /// An index or a safetensors header that does not parse, names something twice, or gives tensors overlapping
    /// places or sizes other than their shapes'.
    #[error("{}: bad {part}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// "index" or "safetensors header".
        part: &'static str,
        /// What and where.
        source: serde_json::Error,
    },
    /// The index and the shards do not fit together.
    #[error("{}: {problem}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What does not fit.
        problem: String,
    },
}

/// One tensor of a [`Checkpoint`], in place.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Storage type in the file.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Row-major little-endian elements. The file decides where they lie: they may be unaligned.
    pub bytes: &'a [u8],
}

/// Bytes of a mapped file, which stays mapped as long as this lives.
#[derive(Debug, Clone)]
pub struct Mapped {
    map: Arc<Mmap>,
    range: std::ops::Range<usize>,
}

impl Mapped {
    /// The first so many of them.
    pub fn first(self, bytes: usize) -> Self {
        assert!(bytes <= self.range.len(), "bytes of what is mapped");
        Self { range: self.range.start..self.range.start + bytes, ..self }
    }

    /// The bytes, which may be unaligned.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Arc<Mmap>,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes within the shard's file.
    range: std::ops::Range<usize>,
}

/// The tensors of a directory, mapped into memory.
#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
    /// What [`Checkpoint::part`] left out, under its own names.
    others: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// Maps `model.safetensors`, or else the shards that `model.safetensors.index.json` names, and checks all that
    /// can be checked without a model: headers, offsets against sizes, names, and that index and shards agree.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let mut checkpoint =
            Checkpoint { shards: Vec::new(), entries: BTreeMap::new(), others: BTreeMap::new() };
        let (single, index) = (dir.join(WEIGHTS_FILE), dir.join(INDEX_FILE));
        // A dangling link counts as present, so that the error says what is wrong with it.
        let present = |path: &Path| std::fs::symlink_metadata(path).is_ok();
        if present(&single) {
            checkpoint.add(single)?;
        } else if present(&index) {
            checkpoint.add_indexed(dir, &index)?;
        } else {
            return Err(CheckpointError::NoWeights { dir: dir.to_owned() });
        }
        Ok(checkpoint)
    }

    /// Maps one safetensors file.
    pub fn open_file(path: &Path) -> Result<Self, CheckpointError> {
        let mut checkpoint =
            Checkpoint { shards: Vec::new(), entries: BTreeMap::new(), others: BTreeMap::new() };
        checkpoint.add(path.to_owned())?;
        Ok(checkpoint)
    }

    fn add_indexed(&mut self, dir: &Path, index: &Path) -> Result<(), CheckpointError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: Unique<String>,
        }
        let bad = |problem| CheckpointError::Index { path: index.to_owned(), problem };
        let Index { weight_map: Unique(weight_map) } =
            serde_json::from_slice(&read_file(index, MAX_INDEX_BYTES)?)
                .map_err(|source| CheckpointError::Json { path: index.to_owned(), part: "index", source })?;
        let names: BTreeSet<&String> = weight_map.values().collect();
        for name in names {
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(bad(format!("shard {name:?} is not a plain file name in the same directory")));
            }
            let path = dir.join(name);
            if !path.exists() {
                return Err(bad(format!("shard {name:?} is missing; download it")));
            }
            self.add(path)?;
        }
        for (tensor, shard) in &weight_map {
            match self.entries.get(tensor) {
                Some(e) if self.shards[e.shard].path.file_name() == Some(shard.as_ref()) => {}
                _ => {
                    return Err(bad(format!(
                        "tensor {tensor:?} is not in shard {shard:?}, where the index puts it"
                    )));
                }
            }
        }
        match self.entries.iter().find(|(name, _)| !weight_map.contains_key(*name)) {
            Some((tensor, e)) => Err(bad(format!(
                "shard {:?} holds tensor {tensor:?}, which the index does not list",
                self.shards[e.shard].path.file_name().unwrap_or_default()
            ))),
            None => Ok(()),
        }
    }

    fn add(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let (file, size) = open_file(&path)?;
        let format = |problem| CheckpointError::Format { path: path.clone(), problem };
        if size < 8 {
            return Err(format(format!("{size} bytes")));
        }
        // SAFETY: the map is only read, as bytes. That no one else changes the file meanwhile cannot be enforced on
        // any system and is the documented condition of a `Checkpoint`; the engine replaces files by renaming.
        let map = unsafe { Mmap::map(&file) }.map_err(FileError::io(Action::Read, &path))?;
        let (length, rest) = map.split_first_chunk().expect("at least 8 bytes");
        let header = match u64::from_le_bytes(*length) {
            n if n > MAX_HEADER_BYTES => {
                return Err(format(format!(
                    "its header claims {n} bytes, at most {MAX_HEADER_BYTES} are possible"
                )));
            }
            n => rest
                .get(..n as usize)
                .ok_or_else(|| format(format!("its header claims {n} bytes, the file has {size}")))?,
        };
        let part = "safetensors header";
        let json = |source| CheckpointError::Json { path: path.clone(), part, source };
        let metadata: Metadata = serde_json::from_slice(header).map_err(json)?;
        // `Metadata` keeps the last of two tensors of one name.
        let Unique::<IgnoredAny>(_) = serde_json::from_slice(header).map_err(json)?;
        let start = 8 + header.len();
        let data = map.len() - start;
        if metadata.data_len() != data {
            let claimed = metadata.data_len();
            return Err(format(format!("its tensors need {claimed} bytes, the file holds {data}")));
        }
        let shard = self.shards.len();
        for (name, info) in metadata.tensors() {
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            let entry = Entry { shard, dtype: info.dtype, shape: info.shape.clone(), range };
            if let Some(other) = self.entries.insert(name.clone(), entry) {
                let problem =
                    format!("holds tensor {name:?}, as does {}", self.shards[other.shard].path.display());
                return Err(CheckpointError::Index { path, problem });
            }
        }
        self.shards.push(Shard { path, map: Arc::new(map) });
        Ok(())
    }

    /// The tensors for which `name` gives a new name, under that; all others become [`Checkpoint::others`].
    pub fn part(self, name: impl Fn(&str) -> Option<String>) -> Self {
        let Self { shards, entries, mut others } = self;
        let mut inner = BTreeMap::new();
        for (stored, entry) in entries {
            match name(&stored) {
                Some(name) => drop(inner.insert(name, entry)),
                None => drop(others.insert(stored, entry)),
            }
        }
        Self { shards, entries: inner, others }
    }

    /// The tensors that are no longer part of it, sorted by name.
    pub fn others(&self) -> impl Iterator<Item = (&str, TensorView<'_>)> {
        self.others.iter().map(|(name, entry)| (name.as_str(), self.view(entry)))
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.entries.get(name).map(|entry| self.view(entry))
    }

    /// The bytes of that tensor, where they lie.
    pub fn mapped(&self, name: &str) -> Option<Mapped> {
        let Entry { shard, range, .. } = self.entries.get(name)?;
        Some(Mapped { map: Arc::clone(&self.shards[*shard].map), range: range.clone() })
    }

    fn view<'a>(&'a self, entry: &'a Entry) -> TensorView<'a> {
        let Entry { shard, dtype, shape, range } = entry;
        TensorView { dtype: *dtype, shape, bytes: &self.shards[*shard].map[range.clone()] }
    }

    /// The mapped files and their sizes in bytes.
    pub fn files(&self) -> impl Iterator<Item = (&Path, u64)> {
        self.shards.iter().map(|s| (s.path.as_path(), s.map.len() as u64))
    }
}

/// A JSON object that must not name a key twice (serde's maps keep the last in silence).
struct Unique<V>(BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Keys<V> {
            type Value = BTreeMap<String, V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut map = BTreeMap::new();
                while let Some((key, value)) = access.next_entry::<String, V>()? {
                    if map.contains_key(&key) {
                        return Err(A::Error::custom(format_args!("{key:?} appears twice")));
                    }
                    map.insert(key, value);
                }
                Ok(map)
            }
        }
        deserializer.deserialize_map(Keys(PhantomData)).map(Unique)
    }
}
