//! `--device`: what a command computes on.

use std::fmt;
use std::str::FromStr;

use super::progress::Screen;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::entries::compiled;
use crate::device::driver::{Gpu, gpus};
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

impl DeviceChoice {
    /// Opens the device, with the kernels where it needs them.
    pub fn open(self) -> anyhow::Result<Engine> {
        Ok(match self {
            Self::Cpu => Engine::Cpu(Cpu),
            Self::Vm => Engine::Cuda(Cuda::new(Box::new(Vm::new(Options::default())))?),
            Self::Cuda(index) => {
                let gpu = Box::new(Gpu::open(index)?);
                let screen = Screen::default();
                let spinner = screen.spinner(
                    "{spinner} {elapsed} the driver compiles the kernels for this GPU, and keeps them for the next time",
                );
                let cuda = Cuda::new(gpu)?;
                spinner.finish_and_clear();
                Engine::Cuda(cuda)
            }
            Self::Auto => match first_gpu() {
                Some(index) => Self::Cuda(index).open()?,
                None => Engine::Cpu(Cpu),
            },
        })
    }
}

/// The first GPU that this program can compute on.
fn first_gpu() -> Option<usize> {
    if !compiled() {
        return None;
    }
    // Why there is none is for `bon-engine devices` to say.
    gpus().unwrap_or_default().into_iter().find(|gpu| gpu.usable).map(|gpu| gpu.ordinal)
}
