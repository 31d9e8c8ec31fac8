//! What the tests of kernels share: a device with one module, random data, number formats, comparisons.

use bytemuck::{NoUninit, Pod};
use ptxvm::{Arg, DevicePtr, Error, Gpu, Launch, LoadedModule, Module, Options, Report};

use crate::toolchain;

/// How a `.cu` is compiled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Build {
    pub(crate) arch: &'static str,
    pub(crate) flags: &'static [&'static str],
}

/// As shipped, for Ampere.
pub(crate) const SM80: Build = Build { arch: "80", flags: &["-O3", "-lineinfo"] };
/// As shipped, for Hopper.
pub(crate) const SM90: Build = Build { arch: "90", flags: &["-O3", "-lineinfo"] };
/// With debug code: everything in local memory, calls instead of inlining.
pub(crate) const DEBUG: Build = Build { arch: "80", flags: &["-G"] };
/// Fast approximations and flushed subnormals.
pub(crate) const FAST: Build = Build { arch: "80", flags: &["-O3", "-use_fast_math"] };
/// What most tests run.
pub(crate) const BUILDS: [Build; 3] = [SM80, SM90, DEBUG];

/// Something a launch takes.
pub(crate) trait ToArg {
    fn to_arg(&self) -> Arg;
}
macro_rules! to_arg {
    ($($ty:ty => $variant:ident),*) => {
        $(impl ToArg for $ty { fn to_arg(&self) -> Arg { Arg::$variant(self.clone()) } })*
    };
}
to_arg!(DevicePtr => Ptr, u32 => U32, i32 => I32, u64 => U64, f32 => F32, f64 => F64, Vec<u8> => Bytes);

/// A GPU with one loaded module.
pub(crate) struct Device {
    pub(crate) gpu: Gpu,
    module: LoadedModule,
    entries: Vec<String>,
    /// Blocks of a cluster of the launches.
    pub(crate) cluster: Option<[u32; 3]>,
}

impl Device {
    pub(crate) fn new(cu: &str, build: Build) -> Self {
        Self::with_ptx(cu, &toolchain::ptx(cu, build.arch, build.flags))
    }

    pub(crate) fn with_ptx(name: &str, text: &str) -> Self {
        let mut gpu = Gpu::new(Options::default());
        let module = Module::load(name, text).unwrap_or_else(|e| panic!("{name}: {e}"));
        let module = gpu.load(&module).unwrap_or_else(|e| panic!("{name}: {e}"));
        let name_of = |rest: &str| rest.split('(').next().unwrap().trim().to_owned();
        let entries =
            text.lines().filter_map(|line| line.split_once(".entry ")).map(|(_, rest)| name_of(rest));
        Self { gpu, module, entries: entries.collect(), cluster: None }
    }

    /// The kernel of that name, or the only one with `name` in its mangled name.
    fn entry(&self, name: &str) -> String {
        if self.entries.iter().any(|entry| entry == name) {
            return name.to_owned();
        }
        let found: Vec<_> = self.entries.iter().filter(|entry| entry.contains(name)).collect();
        assert_eq!(found.len(), 1, "{name} among {:?}", self.entries);
        found[0].clone()
    }

    pub(crate) fn upload<T: NoUninit>(&mut self, data: &[T]) -> DevicePtr {
        let ptr = self.empty::<T>(data.len());
        self.gpu.write(ptr, bytemuck::cast_slice(data)).unwrap();
        ptr
    }

    /// Memory that nobody has written.
    pub(crate) fn empty<T>(&mut self, len: usize) -> DevicePtr {
        self.gpu.alloc(len * size_of::<T>()).unwrap()
    }

    pub(crate) fn download<T: Pod>(&mut self, ptr: DevicePtr, len: usize) -> Vec<T> {
        let mut data = vec![T::zeroed(); len];
        self.gpu.read(ptr, bytemuck::cast_slice_mut(&mut data)).unwrap();
        data
    }

    pub(crate) fn try_run(
        &mut self,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: u32,
        cooperative: bool,
        args: &[&dyn ToArg],
    ) -> Result<Report, Error> {
        let entry = self.entry(name);
        let args: Vec<Arg> = args.iter().map(|arg| arg.to_arg()).collect();
        let launch = Launch { grid, block, shared_bytes, cooperative, cluster: self.cluster };
        self.gpu.launch(&self.module, &entry, &launch, &args)
    }

    /// A launch that must go well.
    pub(crate) fn run(&mut self, name: &str, grid: impl Dim, block: impl Dim, args: &[&dyn ToArg]) -> Report {
        self.run_shared(name, grid, block, 0, args)
    }

    pub(crate) fn run_shared(
        &mut self,
        name: &str,
        grid: impl Dim,
        block: impl Dim,
        shared: u32,
        args: &[&dyn ToArg],
    ) -> Report {
        self.try_run(name, grid.dim(), block.dim(), shared, false, args)
            .unwrap_or_else(|e| panic!("{name}: {e}"))
    }
}

/// Sizes of grids and blocks in one to three dimensions.
pub(crate) trait Dim {
    fn dim(self) -> [u32; 3];
}
impl Dim for usize {
    fn dim(self) -> [u32; 3] {
        [self as u32, 1, 1]
    }
}
impl Dim for (usize, usize) {
    fn dim(self) -> [u32; 3] {
        [self.0 as u32, self.1 as u32, 1]
    }
}
impl Dim for (usize, usize, usize) {
    fn dim(self) -> [u32; 3] {
        [self.0 as u32, self.1 as u32, self.2 as u32]
    }
}

/// Steele, Lea and Flood's SplitMix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn u32(&mut self) -> u32 {
        (self.u64() >> 32) as u32
    }

    /// In `0..n`.
    pub(crate) fn below(&mut self, n: u64) -> usize {
        (self.u64() % n) as usize
    }

    /// In [-1, 1).
    pub(crate) fn f64(&mut self) -> f64 {
        (self.u64() as i64) as f64 / 2f64.powi(63)
    }

    pub(crate) fn f32(&mut self) -> f32 {
        ((self.u64() >> 40) as i64 - (1 << 23)) as f32 / (1 << 23) as f32
    }

    pub(crate) fn vec<T>(&mut self, n: usize, mut next: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..n).map(|_| next(self)).collect()
    }

    pub(crate) fn f32s(&mut self, n: usize) -> Vec<f32> {
        self.vec(n, Self::f32)
    }
}

/// IEEE's directed roundings and ties-to-even.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Round {
    Nearest,
    Zero,
    Up,
    Down,
}

/// `v` in a format with `p` significand bits (the hidden one counted) and least normal exponent `emin`: the value,
/// unbounded above. `p` is at most 53.
pub(crate) fn round_to(v: f64, p: i32, emin: i32, how: Round) -> f64 {
    if v == 0.0 || !v.is_finite() {
        return v;
    }
    let exponent = (((v.to_bits() >> 52 & 0x7ff) as i32) - 1023).max(emin);
    let unit = 2f64.powi(exponent - p + 1);
    let steps = v / unit;
    let whole = match how {
        Round::Nearest => steps.round_ties_even(),
        Round::Zero => steps.trunc(),
        Round::Up => steps.ceil(),
        Round::Down => steps.floor(),
    };
    (whole * unit).copysign(v)
}

/// f64 to binary16, to infinity (or the largest number, as the rounding has it) beyond its range.
pub(crate) fn f16(v: f64, how: Round) -> u16 {
    small(v, 11, -14, 15, how)
}

/// f64 to bfloat16.
pub(crate) fn bf16(v: f64, how: Round) -> u16 {
    small(v, 8, -126, 127, how)
}

fn small(v: f64, p: i32, emin: i32, emax: i32, how: Round) -> u16 {
    let sign = u16::from(v.is_sign_negative()) << 15;
    let infinity = ((emax - emin + 2) << (p - 1)) as u16;
    if v.is_nan() {
        return 0x7fff; // the canonical NaN of both formats
    }
    let r = round_to(v, p, emin, how).abs();
    let largest = (2.0 - 2f64.powi(1 - p)) * 2f64.powi(emax);
    if v.is_finite() && r > largest {
        let to_infinity = match how {
            Round::Nearest => true,
            Round::Zero => false,
            Round::Up => sign == 0,
            Round::Down => sign != 0,
        };
        return sign | if to_infinity { infinity } else { infinity - 1 };
    }
    if r.is_infinite() {
        return sign | infinity;
    }
    let units = if r < 2f64.powi(emin) {
        r / 2f64.powi(emin - p + 1)
    } else {
        let exponent = (r.to_bits() >> 52) as i32 - 1023;
        f64::from(exponent - emin) * 2f64.powi(p - 1) + r / 2f64.powi(exponent - p + 1)
    };
    sign | units as u16
}

pub(crate) fn from_f16(bits: u16) -> f64 {
    widen(bits, 11, -14)
}

pub(crate) fn from_bf16(bits: u16) -> f64 {
    widen(bits, 8, -126)
}

fn widen(bits: u16, p: i32, emin: i32) -> f64 {
    let magnitude = i32::from(bits & 0x7fff);
    let (exponent, fraction) = (magnitude >> (p - 1), magnitude & ((1 << (p - 1)) - 1));
    let v = if exponent == (1 << (16 - p)) - 1 {
        if fraction == 0 { f64::INFINITY } else { f64::NAN }
    } else if exponent == 0 {
        f64::from(fraction) * 2f64.powi(emin - p + 1)
    } else {
        f64::from(fraction + (1 << (p - 1))) * 2f64.powi(exponent - 1 + emin - p + 1)
    };
    if bits >> 15 == 1 { -v } else { v }
}

/// |got - want| <= bound, or both NaN, or equal (infinities).
#[track_caller]
pub(crate) fn near(got: f64, want: f64, bound: f64, what: impl std::fmt::Debug) {
    let same = got == want || (got.is_nan() && want.is_nan());
    assert!(same || (got - want).abs() <= bound, "{what:?}: {got} is not {want} within {bound:e}");
}

/// The gap between f32 numbers at `v`, the least normal one's below it.
pub(crate) fn ulp32(v: f64) -> f64 {
    2f64.powi(((v.abs().max(2f64.powi(-126)).to_bits() >> 52) as i32) - 1023 - 23)
}

/// The same for f64, of the number nearest to `v`.
pub(crate) fn ulp64(v: f64) -> f64 {
    2f64.powi((((v.abs().max(2f64.powi(-960)).to_bits() >> 52) as i32) - 1023 - 52).max(-1022))
}

/// Unit roundoffs.
pub(crate) const U32: f64 = 1.0 / (1u64 << 24) as f64;
pub(crate) const U64: f64 = 1.0 / (1u64 << 53) as f64;

#[test]
fn small_formats_round_trip() {
    for bits in 0..=u16::MAX {
        let (h, b) = (from_f16(bits), from_bf16(bits));
        for how in [Round::Nearest, Round::Zero, Round::Up, Round::Down] {
            assert!(h.is_nan() || f16(h, how) == bits, "f16 {bits:#06x}");
            assert!(b.is_nan() || bf16(b, how) == bits, "bf16 {bits:#06x}");
        }
        assert_eq!(f32::from_bits(u32::from(bits) << 16).to_string(), (b as f32).to_string());
    }
    assert_eq!(f16(65520.0, Round::Nearest), 0x7c00);
    assert_eq!(f16(65519.9, Round::Nearest), 0x7bff);
    assert_eq!(bf16(1.0 + 2f64.powi(-8), Round::Nearest), 0x3f80);
    assert_eq!(bf16(1.0 + 2f64.powi(-8), Round::Up), 0x3f81);
    assert_eq!(bf16(-1.001, Round::Down), 0xbf81);
}
