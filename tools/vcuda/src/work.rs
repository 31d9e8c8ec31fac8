//! Work in streams and graphs. It runs when somebody waits for it, as late as a GPU might.

use std::ffi::c_void;
use std::sync::Arc;

use ptxvm::error::ErrorKind;
use ptxvm::{ClusterShape, DevicePtr, Error, Gpu, Launch};

use crate::code::{Code, say};

/// A kernel of a loaded module.
#[derive(Debug)]
pub struct Function {
    /// Handle of its module.
    pub owner: u64,
    /// Its name.
    pub name: String,
    /// Where each parameter begins, and its bytes.
    pub params: Vec<(u32, u32)>,
    /// Static shared memory.
    pub shared: u32,
    /// Most threads of a block.
    pub threads: u32,
    /// Whether it waits for the kernels ahead of it before it does anything.
    pub waits: bool,
    /// What it says of its clusters.
    pub cluster: ClusterShape,
}

/// Bytes on the host.
#[derive(Debug, Clone)]
pub enum Host {
    /// Page-locked memory: read or written when the work runs.
    Locked(usize),
    /// The contents of other memory at the time of the call.
    Copied(Arc<[u8]>),
}

/// One side of a copy.
#[derive(Debug, Clone)]
pub enum Side {
    /// Device memory at an address.
    Device(u64),
    /// Memory of the host.
    Host(Host),
}

/// A box of bytes in memory: where it begins, bytes from row to row and from slice to slice.
#[derive(Debug, Clone)]
pub struct Boxed {
    /// Where.
    pub at: Side,
    /// Bytes from row to row.
    pub row: usize,
    /// Bytes from slice to slice.
    pub slice: usize,
}

/// A function of the host that a stream calls.
#[derive(Debug, Clone, Copy)]
pub enum Call {
    /// CUhostFn.
    Plain(unsafe extern "C" fn(*mut c_void)),
    /// CUstreamCallback, with the stream's handle.
    Callback(unsafe extern "C" fn(*mut c_void, u32, *mut c_void), u64),
}

/// One piece of work.
#[derive(Debug, Clone)]
pub enum Work {
    /// Bytes of each row, rows, slices.
    Copy(Boxed, Boxed, [usize; 3]),
    /// Rows of a pattern that repeats: address, pattern, bytes from row to row, bytes of a row, rows.
    Fill(u64, Vec<u8>, usize, [usize; 2]),
    /// A kernel, with its arguments' bytes.
    Launch(Arc<Function>, Launch, Vec<Vec<u8>>),
    /// All that came before has passed: the event.
    Record(u64),
    /// Waits until a stream has passed a number.
    After(u64, u64),
    /// A function of the host and its argument.
    Call(Call, usize),
    /// Device memory given back.
    Free(u64),
    /// An executable graph: its handle and its work.
    Graph(u64, Arc<[Work]>),
}

/// The driver's code for what the GPU says.
pub(crate) fn code(e: &Error) -> Code {
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

/// Says what went wrong.
pub(crate) fn failed(what: &str, e: &Error) -> Code {
    say(&format!("{what}: {e}"));
    code(e)
}

/// A kernel's name as its source has it.
pub fn demangled(name: &str) -> String {
    let symbol = cpp_demangle::Symbol::new(name).ok();
    symbol.and_then(|symbol| symbol.demangle().ok()).unwrap_or_else(|| name.to_owned())
}

impl Boxed {
    /// Bytes in one row after another.
    pub fn line(at: Side) -> Self {
        Self { at, row: 0, slice: 0 }
    }

    fn offset(&self, row: usize, slice: usize) -> usize {
        row * self.row + slice * self.slice
    }
}

/// Copies a box.
pub(crate) fn copy(
    gpu: &mut Gpu,
    to: &Boxed,
    from: &Boxed,
    [width, rows, slices]: [usize; 3],
) -> Result<(), Code> {
    for (slice, row) in (0..slices).flat_map(|slice| (0..rows).map(move |row| (slice, row))) {
        let (there, here) = (to.offset(row, slice), from.offset(row, slice));
        match (&to.at, &from.at) {
            (Side::Device(to), Side::Device(from)) => {
                let (to, from) = (DevicePtr(to + there as u64), DevicePtr(from + here as u64));
                gpu.copy(to, from, width).map_err(|e| failed("copy on the device", &e))?;
            }
            (Side::Device(to), Side::Host(from)) => {
                let from = match from {
                    Host::Copied(bytes) => &bytes[here..here + width],
                    // SAFETY: page-locked memory of ours, which is not given back while work uses it.
                    Host::Locked(from) => unsafe {
                        std::slice::from_raw_parts((from + here) as *const u8, width)
                    },
                };
                let to = DevicePtr(to + there as u64);
                gpu.write(to, from).map_err(|e| failed("copy to the device", &e))?;
            }
            (Side::Host(Host::Locked(to)), Side::Device(from)) => {
                // SAFETY: as above; that nobody else uses it meanwhile is the program's part, as with a GPU.
                let to = unsafe { std::slice::from_raw_parts_mut((to + there) as *mut u8, width) };
                let from = DevicePtr(from + here as u64);
                gpu.read(from, to).map_err(|e| failed("copy from the device", &e))?;
            }
            (Side::Host(Host::Locked(to)), Side::Host(from)) => {
                let from = match from {
                    Host::Copied(bytes) => bytes[here..].as_ptr(),
                    Host::Locked(from) => (from + here) as *const u8,
                };
                // SAFETY: as above; the two may overlap.
                unsafe { std::ptr::copy(from, (to + there) as *mut u8, width) };
            }
            (Side::Host(Host::Copied(_)), _) => return Err(Code::UNKNOWN),
        }
    }
    Ok(())
}

/// Fills rows with a pattern.
pub(crate) fn fill(
    gpu: &mut Gpu,
    to: u64,
    pattern: &[u8],
    row: usize,
    [width, rows]: [usize; 2],
) -> Result<(), Code> {
    for i in 0..rows {
        let at = DevicePtr(to + (i * row) as u64);
        let done = match pattern {
            [value] => gpu.fill(at, *value, width),
            _ => gpu.write(at, &pattern.iter().copied().cycle().take(width).collect::<Vec<u8>>()),
        };
        done.map_err(|e| failed("fill", &e))?;
    }
    Ok(())
}
