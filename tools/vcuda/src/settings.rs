//! The machine that the environment asks for.

use std::env;

use ptxvm::MmaOrder;

/// How much of graphs is supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Graphs {
    /// Streams cannot be captured.
    None,
    /// All.
    All,
    /// Executable graphs are made, but there is no memory left to run them.
    Made,
}

/// Properties of the virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The result of cuInit, by the driver's number (`VCUDA_INIT`).
    pub init: u32,
    /// GPUs (`VCUDA_DEVICES`).
    pub devices: i32,
    /// Compute capability (`VCUDA_CAPABILITY`, as in `8.6`).
    pub capability: (i32, i32),
    /// Bytes of each GPU's memory (`VCUDA_MEMORY`).
    pub memory: u64,
    /// Most bytes of shared memory of a block (`VCUDA_SHARED`).
    pub shared: u32,
    /// Multiprocessors (`VCUDA_MULTIPROCESSORS`).
    pub multiprocessors: i32,
    /// CUDA version of the driver (`VCUDA_VERSION`, as in `12.4`).
    pub version: (i32, i32),
    /// How much of graphs is supported (`VCUDA_GRAPHS`).
    pub graphs: Graphs,
    /// Whether races and uninitialised values are looked for (`VCUDA_CHECKS`, 0 or 1).
    pub checks: bool,
    /// How products of tensor cores add up (`VCUDA_MMA`: chain, ampere or hopper).
    pub mma: MmaOrder,
    /// The kernel that fails as soon as it runs (`VCUDA_FAULT`, its name).
    pub fault: Option<String>,
    /// Whether work of streams but the first runs as soon as it may, not as late (`VCUDA_STREAMS`: early or late).
    pub early: bool,
    /// The number, from 1 on, of the event for which streams do not wait (`VCUDA_FORGOTTEN`), counted as they do so first.
    pub forgotten: usize,
    /// Milliseconds without a call after which work runs although nobody waits for it; 0 for never (`VCUDA_PATIENCE`).
    pub patience: Option<u64>,
    /// Whether a launch waits until it has run (`CUDA_LAUNCH_BLOCKING`, 0 or 1, as NVIDIA's driver has it).
    pub blocking: bool,
}

fn variable<T>(name: &str, default: T, parse: impl Fn(&str) -> Option<T>) -> Result<T, String> {
    match env::var(name) {
        Err(env::VarError::NotPresent) => Ok(default),
        Ok(text) => parse(&text).ok_or_else(|| format!("{name}={text} is not understood")),
        Err(e) => Err(format!("{name}: {e}")),
    }
}

fn pair(text: &str) -> Option<(i32, i32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn switch(text: &str) -> Option<bool> {
    ["0", "1"].iter().position(|word| *word == text).map(|i| i == 1)
}

impl Settings {
    /// Reads the environment; `version` is the driver's where that says none.
    pub fn read(version: (i32, i32)) -> Result<Self, String> {
        let capability = variable("VCUDA_CAPABILITY", (8, 0), pair)?;
        // As NVIDIA's tables have it: A100, RTX 30 and 40, H100 and later.
        let shared = match capability {
            (..8, _) => 65_536,
            (8, 0 | 7) => 166_912,
            (8, _) | (12.., _) => 101_376,
            _ => 232_448,
        };
        // A100, RTX 3090, RTX 4090, H100, B200; of others, the A100's.
        let multiprocessors = match capability {
            (8, 6) => 82,
            (8, 9) => 128,
            (9, _) => 132,
            (10, _) => 148,
            _ => 108,
        };
        Ok(Self {
            init: variable("VCUDA_INIT", 0, |text| text.parse().ok())?,
            devices: variable("VCUDA_DEVICES", 1, |text| text.parse().ok().filter(|n| (0..=64).contains(n)))?,
            capability,
            memory: variable("VCUDA_MEMORY", 16 << 30, |text| text.parse().ok())?,
            shared: variable("VCUDA_SHARED", shared, |text| text.parse().ok())?,
            multiprocessors: variable("VCUDA_MULTIPROCESSORS", multiprocessors, |text| {
                text.parse().ok().filter(|n| *n > 0)
            })?,
            version: variable("VCUDA_VERSION", version, pair)?,
            graphs: variable("VCUDA_GRAPHS", Graphs::All, |text| {
                [("0", Graphs::None), ("1", Graphs::All), ("made", Graphs::Made)]
                    .into_iter()
                    .find_map(|(word, graphs)| (word == text).then_some(graphs))
            })?,
            checks: variable("VCUDA_CHECKS", true, switch)?,
            mma: variable("VCUDA_MMA", MmaOrder::Chain, MmaOrder::named)?,
            fault: variable("VCUDA_FAULT", None, |text| Some(Some(text.to_owned())))?,
            early: variable("VCUDA_STREAMS", false, |text| match text {
                "early" => Some(true),
                "late" => Some(false),
                _ => None,
            })?,
            forgotten: variable("VCUDA_FORGOTTEN", 0, |text| text.parse().ok())?,
            patience: variable("VCUDA_PATIENCE", None, |text| text.parse().ok().map(Some))?,
            blocking: variable("CUDA_LAUNCH_BLOCKING", false, switch)?,
        })
    }

    /// Threads, bytes of shared memory and blocks that a multiprocessor holds at once.
    pub fn multiprocessor(&self) -> (u32, u32, u32) {
        // A kibibyte of each block's shared memory is the driver's.
        let shared = self.shared + (1 << 10);
        match self.capability {
            (8, 6 | 7) => (1536, shared, 16),
            (8, 9) => (1536, shared, 24),
            (12.., _) => (1536, shared, 24),
            _ => (2048, shared, 32),
        }
    }

    /// The newest PTX that a driver of [`Settings::version`] takes.
    pub fn ptx(&self) -> (i32, i32) {
        match self.version {
            (..11, _) => (6, 5),
            (11, minor) => (7, minor),
            // 12.6 brought no new PTX; from there on it lags by one.
            (12, minor) => (8, if minor <= 5 { minor } else { minor - 1 }),
            (major, minor) => (major - 4, minor),
        }
    }
}
