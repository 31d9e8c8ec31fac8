//! `--device`: what a command computes on.

use std::fmt;
use std::str::FromStr;

use super::progress::{Screen, note};
use crate::backend::Platform;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::entries::{NO_KERNELS, compiled};
use crate::device::driver::{self, Gpu};
use crate::device::vm::{Options, Vm};

/// `--device` for commands that compute.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct DeviceArg {
    /// What computes: cpu; cuda or cuda:1, a GPU; vm, a virtual GPU that runs the CUDA kernels on the CPU, checked and
    /// slow; auto, the first GPU or, without one, the CPU
    #[arg(long = "device", value_name = "DEVICE", default_value = "auto")]
    pub choice: DeviceChoice,
}

/// A value of `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
    /// The virtual GPU.
    Vm,
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Vm => f.write_str("vm"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "vm" => Ok(Self::Vm),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match text.strip_prefix("cuda:").and_then(|n| n.parse().ok()) {
                Some(n) => Ok(Self::Cuda(n)),
                None => Err(
                    "must be auto, cpu, cuda, cuda:<number> or vm; `bon-engine devices` lists what there is",
                ),
            },
        }
    }
}

/// A backend, opened.
pub enum Engine {
    /// Native code.
    Cpu(Cpu),
    /// The kernels on a device.
    Cuda(Cuda),
}

impl Engine {
    /// The device's name.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu(cpu) => cpu.device_name(),
            Self::Cuda(cuda) => cuda.device_name(),
        }
    }
}

/// Runs a command that is generic over its backend with that of an [`Engine`].
macro_rules! with_backend {
    ($engine:expr, |$backend:ident| $command:expr) => {
        match $engine {
            $crate::cli::engine::Engine::Cpu($backend) => $command,
            $crate::cli::engine::Engine::Cuda($backend) => $command,
        }
    };
}
pub(super) use with_backend;

impl DeviceChoice {
    /// Opens the device, with the kernels where it needs them.
    pub fn open(self) -> anyhow::Result<Engine> {
        Ok(match self {
            Self::Cpu => Engine::Cpu(Cpu::default()),
            Self::Vm => Engine::Cuda(Cuda::new(Box::new(Vm::new(Options::default())))?),
            Self::Cuda(index) => {
                let gpu = Box::new(Gpu::open(index)?);
                let (screen, mut spinner) = (Screen::default(), None);
                let cuda = Cuda::loading(gpu, || {
                    spinner = Some(screen.spinner(
                        "{spinner} {elapsed} the driver compiles the kernels for this GPU, and keeps them for the next time",
                    ));
                });
                if let Some(spinner) = spinner {
                    spinner.finish_and_clear();
                }
                let cuda = cuda?;
                Engine::Cuda(cuda)
            }
            Self::Auto => {
                let opened = first_gpu().and_then(|index| {
                    let Some(index) = index else { return Ok(Engine::Cpu(Cpu::default())) };
                    Self::Cuda(index).open().map_err(|e| format!("{e:#}"))
                });
                opened.unwrap_or_else(|why| {
                    note(&format!("note: computing on the CPU, not on a GPU: {why}"));
                    Engine::Cpu(Cpu::default())
                })
            }
        })
    }
}

/// The first GPU that this program can compute on; `None` on a machine without a driver, which has none. Where there is
/// a driver, whoever did not ask for the CPU should hear why it is not used.
fn first_gpu() -> Result<Option<usize>, String> {
    if !driver::installed() {
        return Ok(None);
    }
    let gpus = driver::gpus().map_err(|e| e.message)?;
    let usable = gpus.iter().find(|gpu| gpu.usable).map(|gpu| gpu.ordinal);
    match usable {
        _ if !compiled() => Err(NO_KERNELS.into()),
        Some(_) => Ok(usable),
        None => Err("none has compute capability 8.0 (Ampere) or newer".into()),
    }
}
