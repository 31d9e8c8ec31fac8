//! A launch: files to buffers, the kernel, buffers to files.

use std::io::Write;
use std::path::{Path, PathBuf};

use ptxvm::ptx::ast::{Function, Variable};
use ptxvm::ptx::{MAX_TEXT_BYTES, parse};
use ptxvm::{Arg, DevicePtr, Gpu, Launch, Module, Options, Report};

use super::arg::{Memory, Save, Spec, Value};
use super::npy::{self, Header};
use super::number::Element;
use super::{Failure, LaunchArgs, files, usage};

/// The text of a PTX file.
pub(crate) fn text(path: &Path) -> Result<String, Failure> {
    let bytes = files::read(path, MAX_TEXT_BYTES as u64)?;
    String::from_utf8(bytes).or_else(|_| {
        usage(format!("{}: no text; give PTX, not a cubin or fatbin (nvcc -ptx makes it)", path.display()))
    })
}

/// A parameter, for messages.
pub(crate) fn parameter(v: &Variable<'_>) -> String {
    match v.bytes {
        Some(bytes) if bytes != u64::from(v.ty.bytes()) => format!("{} .b8[{bytes}]", v.name),
        _ => format!("{} {}", v.name, v.ty),
    }
}

/// A buffer to save after the launch.
struct Output {
    to: Save,
    ptr: DevicePtr,
    bytes: u64,
    /// Its element type and shape; `None` for bytes without a type.
    header: Option<Header>,
    /// Its heading, when it is printed.
    title: String,
}

/// A launch that ended well.
pub(crate) struct Done {
    /// The PTX.
    pub(crate) text: String,
    /// The counters.
    pub(crate) report: Report,
    gpu: Gpu,
    outputs: Vec<Output>,
}

/// Whether the values of a buffer shall be printed.
pub(crate) fn prints(args: &LaunchArgs) -> bool {
    args.args.iter().any(|spec| {
        matches!(spec.memory(), Some(Memory::Load(_, Some(Save::Print)) | Memory::Out(Save::Print, ..)))
    })
}

/// `ptxvm run`
pub(crate) fn run(args: &LaunchArgs) -> Result<(), Failure> {
    let done = launch(args)?;
    let mut out = std::io::stdout().lock();
    out.write_all(done.report.printed.as_bytes())?;
    done.tell()?;
    done.save(&mut out)?;
    out.flush()?;
    Ok(())
}

/// Runs the kernel; nothing is saved yet.
pub(crate) fn launch(args: &LaunchArgs) -> Result<Done, Failure> {
    let text = text(&args.ptx)?;
    let name = args.ptx.display().to_string();
    let module = Module::load(&name, &text)?;
    let tree = parse(&name, &text)?;
    let kernel = choose(&name, args.entry.as_deref(), &module.kernels())?;
    if let Some(f) = tree.functions.iter().find(|f| f.is_entry && f.name == kernel && f.body.is_some()) {
        check_parameters(f, &args.args)?;
    }
    check_places(&args.args)?;

    let mut gpu = Gpu::new(Options {
        threads: args.threads.into(),
        checks: args.checks.checks(),
        budget: args.budget,
        seed: args.seed,
        mma: args.mma,
        ..Options::default()
    });
    let loaded = gpu.load(&module)?;
    let mut outputs = Vec::new();
    let mut values = Vec::new();
    for (i, spec) in args.args.iter().enumerate() {
        values.push(make(&mut gpu, spec, i + 1, &mut outputs)?);
    }
    let shape = Launch {
        grid: args.grid,
        block: args.block,
        shared_bytes: args.shared,
        cooperative: args.cooperative,
        cluster: args.cluster,
    };
    let report = gpu.launch(&loaded, kernel, &shape, &values)?;
    drop(tree);
    Ok(Done { text, report, gpu, outputs })
}

/// The kernel that `--entry` means: its name, or the part of it that the C++ compiler made it from.
fn choose<'a>(file: &str, entry: Option<&str>, kernels: &[&'a str]) -> Result<&'a str, Failure> {
    let among = || match kernels {
        [] => "it has none; was the kernel a template that nobody used?".to_owned(),
        _ => format!("it has {}", kernels.join(", ")),
    };
    let Some(entry) = entry else {
        return match kernels {
            [one] => Ok(one),
            [] => usage(format!("{file} has no kernel (.entry)")),
            _ => usage(format!(
                "{file} has {} kernels; name one with --entry: {}",
                kernels.len(),
                kernels.join(", ")
            )),
        };
    };
    if let Some(exact) = kernels.iter().find(|k| **k == entry) {
        return Ok(exact);
    }
    let mangled = format!("{}{entry}", entry.len());
    let found: Vec<&str> =
        kernels.iter().copied().filter(|k| k.starts_with("_Z") && k.contains(&mangled)).collect();
    match found[..] {
        [one] => Ok(one),
        [] => usage(format!("--entry {entry}: {file} has no such kernel; {}", among())),
        _ => usage(format!("--entry {entry}: several kernels are called so: {}", found.join(", "))),
    }
}

fn check_parameters(f: &Function<'_>, args: &[Spec]) -> Result<(), Failure> {
    if f.params.len() != args.len() {
        let list: Vec<String> = f.params.iter().map(parameter).collect();
        let list = if list.is_empty() { String::new() } else { format!(" ({})", list.join(", ")) };
        return usage(format!(
            "{} parameters{list} of `{}`, but {} arguments; give one --arg for each",
            f.params.len(),
            f.name,
            args.len()
        ));
    }
    for (i, (p, spec)) in f.params.iter().zip(args).enumerate() {
        let bytes = p.bytes.unwrap_or(0);
        if bytes != spec.bytes() as u64 {
            return usage(format!(
                "--arg {}: {} bytes, but parameter {} of `{}` ({}) has {bytes}",
                spec.text,
                spec.bytes(),
                i + 1,
                f.name,
                parameter(p)
            ));
        }
    }
    Ok(())
}

/// Finds errors of saving before the launch, not after it.
fn check_places(args: &[Spec]) -> Result<(), Failure> {
    let mut seen: Vec<PathBuf> = Vec::new();
    for spec in args {
        let Some(Memory::Load(_, Some(Save::File(path))) | Memory::Out(Save::File(path), ..)) = spec.memory()
        else {
            continue;
        };
        let place = files::writable(path)?;
        if seen.contains(&place) {
            return usage(format!("--arg {}: another argument is saved there as well", spec.text));
        }
        seen.push(place);
    }
    Ok(())
}

fn is_npy(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy"))
}

/// Makes the argument, and lists the buffer if it is to be saved.
fn make(gpu: &mut Gpu, spec: &Spec, number: usize, outputs: &mut Vec<Output>) -> Result<Arg, Failure> {
    match &spec.value {
        Value::Bytes(bytes) => Ok(Arg::Bytes(bytes.clone())),
        Value::Map(tensor, memory) => {
            let at = fill(gpu, spec, memory, number, outputs)?;
            let map = tensor.encode(at.0);
            map.map(Arg::Bytes).or_else(|e| usage(format!("--arg {}: {e}", spec.text)))
        }
        Value::Null => Ok(Arg::Ptr(DevicePtr(0))),
        Value::Memory(memory) => fill(gpu, spec, memory, number, outputs).map(Arg::Ptr),
    }
}

/// The memory of an argument.
fn fill(
    gpu: &mut Gpu,
    spec: &Spec,
    memory: &Memory,
    number: usize,
    outputs: &mut Vec<Output>,
) -> Result<DevicePtr, Failure> {
    let alloc = |gpu: &mut Gpu, bytes: u64| gpu.alloc_named(bytes as usize, &spec.text);
    let ptr = match memory {
        Memory::Scratch(bytes) => alloc(gpu, *bytes)?,
        Memory::Zeros(bytes) => {
            let ptr = alloc(gpu, *bytes)?;
            gpu.fill(ptr, 0, *bytes as usize)?;
            ptr
        }
        Memory::Out(to, element, shape, bytes) => {
            let ptr = alloc(gpu, *bytes)?;
            let header = Header::new(*element, shape);
            let title = format!("argument {number}, {}{shape:?}:", element.name());
            outputs.push(Output { to: to.clone(), ptr, bytes: *bytes, header: Some(header), title });
            ptr
        }
        Memory::Load(from, to) => {
            let file = files::read(from, gpu.options().memory)?;
            let (header, data) = if is_npy(from) {
                let (header, data) =
                    npy::read(&file).or_else(|e| usage(format!("{}: {e}", from.display())))?;
                (Some(header), data)
            } else {
                (None, &file[..])
            };
            let ptr = alloc(gpu, data.len() as u64)?;
            gpu.write(ptr, data)?;
            if let Some(to) = to {
                let element = header.as_ref().and_then(|h| Element::from_npy(&h.descr));
                let known = match to {
                    Save::Print => element.is_some(),
                    Save::File(path) => header.is_some() || !is_npy(path),
                };
                if !known {
                    return usage(format!(
                        "--arg {}: the type of the values is not known; load an .npy of integers or floats, or save \
                         as .raw",
                        spec.text
                    ));
                }
                let shape = header.as_ref().map_or(&[][..], |h| &h.shape);
                let title = format!("argument {number}, {}{shape:?}:", element.map_or("", Element::name));
                outputs.push(Output { to: to.clone(), ptr, bytes: data.len() as u64, header, title });
            }
            ptr
        }
    };
    Ok(ptr)
}

/// Bytes of a buffer that are in the host's memory at a time; a multiple of every element's size.
const PIECE: u64 = 1 << 20;

impl Output {
    fn copy(&self, gpu: &Gpu, mut take: impl FnMut(&[u8]) -> Result<(), Failure>) -> Result<(), Failure> {
        let mut piece = vec![0; self.bytes.min(PIECE) as usize];
        let mut at = 0;
        while at < self.bytes {
            let piece = &mut piece[..(self.bytes - at).min(PIECE) as usize];
            gpu.read(self.ptr.offset(at), piece)?;
            take(piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// One line for each row of the last dimension.
    fn print(&self, gpu: &Gpu, out: &mut dyn Write) -> Result<(), Failure> {
        let Some((header, element)) =
            self.header.as_ref().and_then(|h| Element::from_npy(&h.descr).map(|e| (h, e)))
        else {
            return Ok(());
        };
        writeln!(out, "{}", self.title)?;
        let row = header.shape.last().copied().unwrap_or(1);
        let mut column = 0;
        self.copy(gpu, |piece| {
            for value in piece.chunks_exact(element.bytes()) {
                column += 1;
                let end = if column == row { '\n' } else { ' ' };
                column %= row;
                write!(out, "{}{end}", element.text(value))?;
            }
            Ok(())
        })
    }
}

impl Done {
    /// Prints the launch's notes to standard error.
    pub(crate) fn tell(&self) -> std::io::Result<()> {
        self.report.notes.iter().try_for_each(|note| writeln!(std::io::stderr(), "note: {note}"))
    }

    /// Saves and prints the buffers, in the order of the arguments.
    pub(crate) fn save(&self, out: &mut dyn Write) -> Result<(), Failure> {
        for output in &self.outputs {
            match &output.to {
                Save::Print => output.print(&self.gpu, out)?,
                Save::File(path) => files::write(&files::writable(path)?, |file| {
                    if let Some(header) = output.header.as_ref().filter(|_| is_npy(path)) {
                        file.write_all(&header.bytes())?;
                    }
                    output.copy(&self.gpu, |piece| Ok(file.write_all(piece)?))
                })?,
            }
        }
        Ok(())
    }
}
