//! Work in streams and graphs. It runs when somebody waits for it, as late as a GPU might.

use std::sync::Arc;

use ptxvm::error::ErrorKind;
use ptxvm::{Arg, DevicePtr, Error, Gpu, Launch, LoadedModule};

use crate::code::{Code, say};

/// A kernel of a loaded module.
#[derive(Debug)]
pub struct Function {
    /// Handle of its module.
    pub owner: u64,
    /// The module.
    pub module: LoadedModule,
    /// Its name.
    pub name: String,
    /// Bytes of each parameter.
    pub params: Vec<u32>,
    /// Static shared memory.
    pub shared: u32,
    /// Whether it waits for the kernels ahead of it before it does anything.
    pub waits: bool,
}

/// Bytes on the host.
#[derive(Debug, Clone)]
pub enum Host {
    /// Page-locked memory: read or written when the work runs.
    Locked(usize),
    /// The contents of other memory at the time of the call.
    Copied(Arc<[u8]>),
}

/// One piece of work.
#[derive(Debug, Clone)]
pub enum Work {
    /// Host to device.
    In(u64, Host, usize),
    /// Device to page-locked memory.
    Out(usize, u64, usize),
    /// Bytes set to a value.
    Fill(u64, u8, usize),
    /// A kernel, with its arguments' bytes.
    Launch(Arc<Function>, Launch, Vec<Vec<u8>>),
    /// All that came before has passed: the event, and which of its recordings.
    Record(u64, u64),
    /// An executable graph: its handle and its work.
    Graph(u64, Arc<[Work]>),
}

/// The GPU's sentence, and the driver's code for it.
fn code(e: &Error) -> Code {
    let Error::Fault(findings) = e else { return Code::NOT_SUPPORTED };
    match findings.first().map(|f| f.kind) {
        Some(ErrorKind::OutOfBounds | ErrorKind::UseAfterFree | ErrorKind::WrongSpace) => {
            Code::ILLEGAL_ADDRESS
        }
        Some(ErrorKind::Misaligned) => Code::MISALIGNED_ADDRESS,
        Some(ErrorKind::Trap) => Code::ASSERT,
        Some(ErrorKind::Launch) => Code::INVALID_VALUE,
        _ => Code::LAUNCH_FAILED,
    }
}

impl Work {
    /// Runs it; the kernel of the name `fault` fails, and `passed` hears of events.
    pub fn run(
        &self,
        gpu: &mut Gpu,
        fault: Option<&str>,
        passed: &mut dyn FnMut(u64, u64),
    ) -> Result<(), Code> {
        let failed = |what: &str, e: &Error| {
            say(&format!("{what}: {e}"));
            code(e)
        };
        match self {
            Work::In(to, Host::Copied(bytes), _) => {
                gpu.write(DevicePtr(*to), bytes).map_err(|e| failed("copy to the device", &e))
            }
            Work::In(to, Host::Locked(from), bytes) => {
                // SAFETY: page-locked memory of ours, which is not given back while work uses it.
                let from = unsafe { std::slice::from_raw_parts(*from as *const u8, *bytes) };
                gpu.write(DevicePtr(*to), from).map_err(|e| failed("copy to the device", &e))
            }
            Work::Out(to, from, bytes) => {
                // SAFETY: as above; that nobody else uses it meanwhile is the program's part, as with a GPU.
                let to = unsafe { std::slice::from_raw_parts_mut(*to as *mut u8, *bytes) };
                gpu.read(DevicePtr(*from), to).map_err(|e| failed("copy from the device", &e))
            }
            Work::Fill(to, value, bytes) => {
                gpu.fill(DevicePtr(*to), *value, *bytes).map_err(|e| failed("fill", &e))
            }
            Work::Launch(function, ..) if fault == Some(function.name.as_str()) => {
                say(&format!("launch of {}: it fails because VCUDA_FAULT names it", function.name));
                Err(Code::ILLEGAL_ADDRESS)
            }
            Work::Launch(function, shape, args) => {
                let args: Vec<Arg> = args.iter().map(|bytes| Arg::Bytes(bytes.clone())).collect();
                let run = gpu.launch(&function.module, &function.name, shape, &args);
                run.map(drop).map_err(|e| failed(&format!("launch of {}", function.name), &e))
            }
            Work::Record(event, serial) => {
                passed(*event, *serial);
                Ok(())
            }
            Work::Graph(_, steps) => steps.iter().try_for_each(|step| step.run(gpu, fault, passed)),
        }
    }
}
