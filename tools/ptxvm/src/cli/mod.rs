//! The command line: options, and what a failure means for the exit code.

mod arg;
mod check;
mod files;
mod launch;
mod npy;
mod number;
mod report;

use std::io;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ptxvm::error::ErrorKind;
use ptxvm::{Checks, Error};

use arg::Spec;

/// Runs NVIDIA PTX on the CPU, with a sanitizer's checks and a profiler's counters. No GPU is needed.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a kernel; buffers come from files and go to files.
    #[command(after_long_help = SPECS)]
    Run(LaunchArgs),
    /// Parse and decode; list the kernels, and all that is wrong or not supported. Exit code 1 if anything is.
    Check {
        /// PTX files.
        #[arg(required = true, value_name = "PTX")]
        files: Vec<PathBuf>,
    },
    /// Run a kernel and print what was counted: instructions, memory traffic, the hottest lines.
    #[command(after_long_help = SPECS)]
    Report(ReportArgs),
}

const SPECS: &str = "\
Arguments, one --arg for each parameter of the kernel, in order:
  i32:-5 u32:5 u64:5 f32:1.5 f64:1e-3   a number; also i8 i16 i64 u8 u16 f16 bf16, integers also as 0x...
  bytes:00ff12                          the bytes of a parameter, such as a structure
  in:x.npy  in:x.raw                    device memory with what the file holds
  out:y.npy:f32[128,64]                 device memory that nobody has written, saved after the launch
  inout:x.npy:y.npy                     device memory with what the first file holds, saved as the second
  zeros:BYTES  scratch:BYTES            device memory of zeros; device memory that nobody has written
  map:f16[256,512]:box[64,64]:128:in:x.npy
                                        a tensor map of a dense tensor, boxes of it, bytes of its
                                        swizzle (0, 32, 64 or 128), and one of the memories above
  null                                  the null pointer
A file that is not called .npy holds the bytes alone. `-` instead of a file to save prints the values.

Exit code: 0, 1 the program is wrong, 2 the command line or a file is, 3 not supported, 70 a defect of ptxvm.";

#[derive(Args)]
struct LaunchArgs {
    /// The PTX file.
    #[arg(value_name = "PTX")]
    ptx: PathBuf,
    /// The kernel, mangled or not; may be left out where the file has only one.
    #[arg(long, value_name = "NAME")]
    entry: Option<String>,
    /// Blocks.
    #[arg(long, value_name = "X[,Y[,Z]]", value_parser = dims)]
    grid: [u32; 3],
    /// Threads of a block.
    #[arg(long, value_name = "X[,Y[,Z]]", value_parser = dims)]
    block: [u32; 3],
    /// Dynamic shared memory of a block.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    shared: u32,
    /// All blocks run at the same time and may wait for each other.
    #[arg(long)]
    cooperative: bool,
    /// Blocks of a cluster, which reach each other's shared memory (sm_90).
    #[arg(long, value_name = "X[,Y[,Z]]", value_parser = dims)]
    cluster: Option<[u32; 3]>,
    /// Checks of uninitialised values and of races; bounds and alignment are always checked.
    #[arg(long, value_enum, default_value_t = Which::All)]
    checks: Which,
    /// Host threads that run blocks; 0 for as many as the host has. They change no result.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1024))]
    threads: u16,
    /// Let the warps of a block take turns at random, by this seed.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How `mma` adds up products: chain (each rounded), ampere or hopper (in groups, as tensor cores do).
    #[arg(long, value_name = "ORDER", default_value = "chain", value_parser = order)]
    mma: ptxvm::MmaOrder,
    /// Most instructions of one block's warps together, so that an endless loop ends.
    #[arg(long, value_name = "N", default_value_t = ptxvm::Options::default().budget)]
    budget: u64,
    /// One argument of the kernel, see --help.
    #[arg(long = "arg", value_name = "SPEC", num_args = 1..)]
    args: Vec<Spec>,
}

#[derive(Args)]
struct ReportArgs {
    #[command(flatten)]
    launch: LaunchArgs,
    /// Everything as JSON, all lines of the PTX included.
    #[arg(long)]
    json: bool,
    /// How many lines of the PTX to show.
    #[arg(long, value_name = "N", default_value_t = 10)]
    top: usize,
    /// What makes a line hot.
    #[arg(long, value_enum, default_value_t = Heat::Instructions)]
    by: Heat,
}

/// Which checks run.
#[derive(Clone, Copy, ValueEnum)]
enum Which {
    All,
    /// All, and unordered stores of the same value to the same shared memory.
    Strict,
    None,
    Init,
    Race,
}

impl Which {
    fn checks(self) -> Checks {
        match self {
            Self::All => Checks::ALL,
            Self::Strict => Checks::STRICT,
            Self::None => Checks::NONE,
            Self::Init => Checks { race: false, ..Checks::ALL },
            Self::Race => Checks { init: false, ..Checks::ALL },
        }
    }
}

/// What makes a line hot.
#[derive(Clone, Copy, ValueEnum)]
enum Heat {
    /// Instructions of warps.
    Instructions,
    /// Sectors of global and local memory.
    Sectors,
    /// Wavefronts of shared memory.
    Wavefronts,
    /// Branches where the lanes of a warp parted.
    Divergent,
}

/// Why the program ends before its time.
pub(crate) enum Failure {
    /// The command line, or a file that it names.
    Usage(String),
    /// What the machine says.
    Machine(Error),
    /// `check` found something, and has said so.
    Found,
    /// Standard output is closed or full.
    Output(io::Error),
    /// A panic, of which the panic hook has told.
    Panic,
}

impl Failure {
    /// What to print; `None` if there is no more to say.
    pub(crate) fn message(&self) -> Option<String> {
        match self {
            Self::Usage(message) => Some(message.clone()),
            Self::Machine(e) => Some(e.to_string()),
            Self::Found => None,
            // The reader of our output has gone: that is how `| head` says thank you.
            Self::Output(e) if e.kind() == io::ErrorKind::BrokenPipe => None,
            Self::Output(e) => Some(format!("standard output: {e}")),
            Self::Panic => Some("a defect of ptxvm, please report it with the PTX".into()),
        }
    }

    /// The exit code.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            // A launch that does not fit the kernel or the device was asked for on the command line.
            Self::Machine(Error::Fault(found)) if found.iter().all(|f| f.kind == ErrorKind::Launch) => 2,
            Self::Machine(Error::Fault(_)) | Self::Found => 1,
            Self::Machine(Error::Unsupported(_)) => 3,
            Self::Machine(Error::Internal(_)) | Self::Panic => 70,
            Self::Output(e) if e.kind() == io::ErrorKind::BrokenPipe => 0,
            Self::Output(_) => 2,
        }
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::Machine(e)
    }
}

/// For writes to standard output; errors of other files are given their names where they happen.
impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Self::Output(e)
    }
}

fn usage<T>(message: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Usage(message.into()))
}

/// Does what the command line says.
pub(crate) fn run(cli: &Cli) -> Result<(), Failure> {
    match &cli.command {
        Command::Run(args) => launch::run(args),
        Command::Check { files } => check::check(files),
        Command::Report(args) => report::report(args),
    }
}

fn order(text: &str) -> Result<ptxvm::MmaOrder, &'static str> {
    ptxvm::MmaOrder::named(text).ok_or("must be chain, ampere or hopper")
}

/// `X[,Y[,Z]]`
fn dims(text: &str) -> Result<[u32; 3], String> {
    let mut dims = [1; 3];
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() > 3 {
        return Err(format!("{} dimensions; give one to three, such as 16,4", parts.len()));
    }
    for (dim, part) in dims.iter_mut().zip(parts) {
        *dim = part
            .parse()
            .map_err(|_| format!("`{part}` is no number of 32 bits; give one to three, such as 16,4"))?;
    }
    Ok(dims)
}
