//! cvt against exact values: every pair of types, every rounding mode and modifier.

use num_bigint::BigInt;
use ptxvm::types::{Type, TypeKind};

use crate::support::exact::{self, Dyadic, Exact, F32, F64, MODES, Mode, Random, TF32};
use crate::support::op::run;

const INTEGERS: [Type; 8] =
    [Type::U8, Type::S8, Type::U16, Type::S16, Type::U32, Type::S32, Type::U64, Type::S64];
const FLOATS: [Type; 4] = [Type::F16, Type::BF16, Type::F32, Type::F64];
const INTEGRAL: [(&str, Mode); 4] =
    [(".rni", Mode::Rn), (".rzi", Mode::Rz), (".rmi", Mode::Rm), (".rpi", Mode::Rp)];

/// Pairs of formats with 8 bits or fewer.
const NARROW: [Type; 5] = [Type::E4M3X2, Type::E5M2X2, Type::E2M3X2, Type::E3M2X2, Type::E2M1X2];

/// A conversion: modifiers without types, and what they say.
#[derive(Clone, Copy)]
struct Conversion<'a> {
    to: Type,
    from: Type,
    mode: Mode,
    /// All modifiers before the types.
    modifiers: &'a str,
}

fn low(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

/// The value of the low bits of `x` as an integer type.
fn integer(ty: Type, x: u64) -> i128 {
    let value = i128::from(x & low(ty.bits()));
    if ty.is_signed() && value >> (ty.bits() - 1) != 0 { value - (1 << ty.bits()) } else { value }
}

fn range(ty: Type) -> (i128, i128) {
    let n = ty.bits();
    if ty.is_signed() { (-(1 << (n - 1)), (1 << (n - 1)) - 1) } else { (0, (1 << n) - 1) }
}

impl Conversion<'_> {
    fn has(&self, modifier: &str) -> bool {
        self.modifiers.split('.').any(|m| m == modifier)
    }

    /// What the conversion gives, as the bits of its own type (an integer: the value).
    fn expected(&self, source: u64) -> i128 {
        let float = |ty: Type| ty.kind() == TypeKind::Float;
        let ftz = |ty: Type, x: u64| {
            if self.has("ftz") && ty == Type::F32 { exact::flushed(F32, x) } else { x }
        };
        let value = if float(self.from) {
            let format = exact::format_of(self.from);
            exact::decode(format, ftz(self.from, source & low(format.bits)))
        } else {
            let value = integer(self.from, source);
            Exact::Finite(value < 0, Dyadic::new(value, 0))
        };
        if !float(self.to) {
            let (least, most) = range(self.to);
            return match value {
                Exact::Nan if self.from == Type::F64 || self.to.bits() == 64 => {
                    integer(self.to, 1 << (self.to.bits() - 1))
                }
                Exact::Nan => 0,
                Exact::Infinite(negative) => {
                    if negative {
                        least
                    } else {
                        most
                    }
                }
                Exact::Finite(_, value) => {
                    let whole = exact::integral(&value, self.mode);
                    if float(self.from) || self.has("sat") {
                        let held = whole.clamp(BigInt::from(least), BigInt::from(most));
                        i128::try_from(held).expect("in range")
                    } else {
                        // The low bits.
                        let bits: BigInt = whole & BigInt::from(u64::MAX);
                        integer(self.to, u64::try_from(bits).expect("64 bits"))
                    }
                }
            };
        }
        let format = exact::format_of(self.to);
        let whole = INTEGRAL.iter().any(|(name, _)| self.has(&name[1..]));
        let value = match value {
            Exact::Finite(negative, value) if whole => {
                Exact::Finite(negative, Dyadic::new(exact::integral(&value, self.mode), 0))
            }
            value => value,
        };
        if matches!(value, Exact::Nan) {
            return i128::from(match (self.to, self.from) {
                _ if self.has("sat") => 0,
                (Type::TF32, _) => F32.nan,
                (Type::F64, Type::F64) => source | 1 << 51,
                (Type::F64, Type::F32) => widened_nan(source),
                (Type::F64, _) => widened_nan(F32.nan),
                _ => format.nan,
            });
        }
        let mut bits = ftz(self.to, exact::encode(format, self.mode, &value));
        let sign = 1 << (format.bits - 1);
        if self.has("satfinite") {
            let (negative, magnitude) = match &value {
                Exact::Finite(negative, value) => (*negative, Exact::Finite(false, value.magnitude())),
                _ => (matches!(value, Exact::Infinite(true)), Exact::Infinite(false)),
            };
            // Towards zero and to the nearest, magnitudes are rounded alike under both signs.
            bits = exact::encode(format, self.mode, &magnitude).min(format.limit - 1);
            bits |= if negative { sign } else { 0 };
        }
        if self.has("relu") && bits & sign != 0 {
            bits = 0;
        }
        if self.has("sat") {
            bits = exact::saturated(format, bits);
        }
        i128::from(if format == TF32 { bits << 13 } else { bits })
    }

    fn name(&self) -> String {
        format!("cvt{}{}{}", self.modifiers, self.to, self.from)
    }

    /// Runs the conversion from a register of `source` bits to one of `destination` bits.
    fn check(&self, sources: &[u64], source: Type, destination: Type) {
        let name = self.name();
        let got = run(&format!("{name} %out0, %in0;"), &[(source, sources)], &[destination]);
        for (x, got) in sources.iter().zip(&got[0]) {
            // A wider register gets the sign or zeros.
            let want = self.expected(*x) as u64 & low(destination.bits());
            assert_eq!(*got, want, "{name} of {x:x}, {source} to {destination}: {got:x}, not {want:x}");
        }
    }

    /// The same with registers of the types' own sizes.
    fn check_plain(&self, sources: &[u64]) {
        self.check(sources, register(self.from), register(self.to));
    }
}

/// An f32 NaN in f64, made quiet.
fn widened_nan(bits: u64) -> u64 {
    (bits & 0x8000_0000) << 32 | 0x7ff8_0000_0000_0000 | (bits & 0x007f_ffff) << 29
}

/// The smallest register of a type.
fn register(ty: Type) -> Type {
    match ty.bits() {
        8 | 16 => Type::B16,
        32 => Type::B32,
        _ => Type::B64,
    }
}

/// Integers with few and many bits, and those beside powers of two.
fn integers(seed: u64) -> Vec<u64> {
    let mut all = Vec::new();
    for n in 0..64 {
        for x in [(1u64 << n) - 1, 1 << n, (1 << n) + 1, 3 << n, (1 << n) | 1 << (n / 2)] {
            all.extend([x, x.wrapping_neg()]);
        }
    }
    let mut rng = Random(seed);
    for _ in 0..1000 {
        let n = rng.below(64);
        all.push(rng.bits() >> n);
        all.push((rng.bits() as i64 >> n) as u64);
    }
    all
}

/// Floats: edges, random patterns, and those near small integers and integers' ends.
fn floats(ty: Type, seed: u64) -> Vec<u64> {
    let format = exact::format_of(ty);
    let [mut all] = exact::sources::<1>(format, 1, 1500, seed);
    for x in integers(seed) {
        let value = Exact::Finite((x as i64) < 0, Dyadic::new(x as i64, -1));
        let bits = exact::encode(format, Mode::Rz, &value);
        all.extend([bits, bits.wrapping_add(1) & low(format.bits), bits.wrapping_sub(1) & low(format.bits)]);
        let value = Exact::Finite(false, Dyadic::new(x, 0));
        all.push(exact::encode(format, Mode::Rn, &value));
    }
    all
}

#[test]
fn integer_to_integer() {
    let sources = integers(31);
    let registers = [Type::B16, Type::B32, Type::B64];
    for from in INTEGERS {
        for to in INTEGERS {
            let (wanted, given) = (range(to), range(from));
            let can_saturate = wanted.0 > given.0 || wanted.1 < given.1;
            for modifiers in if can_saturate { &["", ".sat"][..] } else { &[""] } {
                let conversion = Conversion { to, from, mode: Mode::Rz, modifiers };
                for source in registers.iter().filter(|r| r.bits() >= from.bits()) {
                    for destination in registers.iter().filter(|r| r.bits() >= to.bits()) {
                        conversion.check(&sources, *source, *destination);
                    }
                }
            }
        }
    }
}

#[test]
fn integer_to_float() {
    let sources = integers(32);
    for from in INTEGERS {
        for to in FLOATS {
            for (name, mode) in MODES {
                let flags: &[&str] = match to {
                    Type::F32 => &["", ".sat", ".ftz", ".ftz.sat"],
                    Type::BF16 if from.bits() == 8 => &[],
                    Type::BF16 => &[""],
                    _ => &["", ".sat"],
                };
                for flag in flags {
                    let modifiers = format!("{name}{flag}");
                    Conversion { to, from, mode, modifiers: &modifiers }.check_plain(&sources);
                }
            }
        }
    }
    // From a wider register.
    for source in [Type::B32, Type::B64] {
        Conversion { to: Type::F32, from: Type::S8, mode: Mode::Rn, modifiers: ".rn" }.check(
            &sources,
            source,
            Type::B32,
        );
    }
}

#[test]
fn float_to_integer() {
    for from in FLOATS {
        let sources = floats(from, 33);
        for to in INTEGERS {
            for (name, mode) in INTEGRAL {
                let flags: &[&str] = match from {
                    Type::F32 => &["", ".sat", ".ftz", ".ftz.sat"],
                    Type::BF16 if to.bits() == 8 => &[],
                    Type::BF16 => &[""],
                    _ => &["", ".sat"],
                };
                for flag in flags {
                    let modifiers = format!("{name}{flag}");
                    let conversion = Conversion { to, from, mode, modifiers: &modifiers };
                    conversion.check_plain(&sources);
                    if flag.is_empty() && from != Type::BF16 {
                        for wide in [Type::B32, Type::B64].into_iter().filter(|r| r.bits() > to.bits()) {
                            conversion.check(&sources, register(from), wide);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn float_to_float() {
    for from in FLOATS {
        let sources = floats(from, 34);
        for to in FLOATS {
            let single = to == Type::F32 || from == Type::F32;
            let mut flags = if single { vec!["", ".ftz", ".sat", ".ftz.sat"] } else { vec!["", ".sat"] };
            if to == Type::BF16 || from == Type::BF16 {
                flags.retain(|flag| !flag.contains(".sat"));
            }
            let exact = to == from || to == Type::F64 || to == Type::F32 && from != Type::F64;
            let modes: Vec<(&str, Mode)> = match (to == from, exact) {
                (true, _) => [&[("", Mode::Rn)], &INTEGRAL[..]].concat(),
                (_, true) => vec![("", Mode::Rn)],
                _ if !single && to != Type::F64 && from != Type::F64 => {
                    [&[("", Mode::Rn)], &MODES[..]].concat()
                }
                _ => MODES.to_vec(),
            };
            for (name, mode) in modes {
                for flag in &flags {
                    let modifiers = format!("{name}{flag}");
                    Conversion { to, from, mode, modifiers: &modifiers }.check_plain(&sources);
                }
            }
        }
    }
    // f16 and f32 may lie in wider registers.
    let sources = floats(Type::F16, 38);
    let noisy: Vec<u64> = sources.iter().map(|x| x | 0xdead_beef_cafe_0000).collect();
    for wide in [Type::B32, Type::B64] {
        Conversion { to: Type::F32, from: Type::F16, mode: Mode::Rn, modifiers: "" }.check(
            &noisy,
            wide,
            Type::B32,
        );
    }
    let sources = floats(Type::F32, 39);
    for wide in [Type::B32, Type::B64] {
        Conversion { to: Type::F16, from: Type::F32, mode: Mode::Rn, modifiers: ".rn" }.check(
            &sources,
            Type::B32,
            wide,
        );
    }
}

#[test]
fn every_half() {
    let all: Vec<u64> = (0..=0xffff).collect();
    for from in [Type::F16, Type::BF16] {
        for to in [Type::F32, Type::F64] {
            Conversion { to, from, mode: Mode::Rn, modifiers: "" }.check_plain(&all);
        }
        for (name, mode) in INTEGRAL {
            for to in [from, Type::S32, Type::U16, Type::S16, Type::S64] {
                Conversion { to, from, mode, modifiers: name }.check_plain(&all);
            }
        }
        // Every value, and what lies in the middle between it and the next, and beside that.
        let sources: Vec<u64> = if from == Type::BF16 {
            all.iter().flat_map(|x| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|y| x << 16 | y)).collect()
        } else {
            let wide = |x: &u64| match exact::decode(exact::F16, *x) {
                Exact::Finite(negative, value) => {
                    exact::encode(F32, Mode::Rn, &Exact::Finite(negative, value))
                }
                _ => 0x477f_f000, // 65520, the first that rounds to infinity
            };
            // Half of the smallest step of a normal number, and of a subnormal one's at these magnitudes.
            let around = |x: u64| {
                let ties = (0..12).map(move |n| x + (0x1000 << n));
                ties.flat_map(|tie| [tie - 1, tie, tie + 1]).chain([x])
            };
            all.iter().map(wide).flat_map(around).map(|x| x & 0xffff_ffff).collect()
        };
        for modifiers in [".rn", ".rn.relu"] {
            Conversion { to: from, from: Type::F32, mode: Mode::Rn, modifiers }.check_plain(&sources);
        }
    }
}

#[test]
fn narrow_floats() {
    // The variants of f32 to f16, bf16 and tf32 that tensor-core code uses.
    let sources = floats(Type::F32, 35);
    for to in [Type::F16, Type::BF16] {
        for (name, mode) in [(".rn", Mode::Rn), (".rz", Mode::Rz)] {
            for flag in ["", ".relu", ".satfinite", ".relu.satfinite"] {
                let modifiers = format!("{name}{flag}");
                Conversion { to, from: Type::F32, mode, modifiers: &modifiers }.check_plain(&sources);
            }
        }
    }
    for (modifiers, mode) in [
        (".rna", Mode::Rna),
        (".rna.satfinite", Mode::Rna),
        (".rn", Mode::Rn),
        (".rz", Mode::Rz),
        (".rn.relu", Mode::Rn),
        (".rz.relu", Mode::Rz),
        (".rn.satfinite", Mode::Rn),
        (".rz.satfinite", Mode::Rz),
        (".rn.satfinite.relu", Mode::Rn),
        (".rz.satfinite.relu", Mode::Rz),
    ] {
        Conversion { to: Type::TF32, from: Type::F32, mode, modifiers }.check_plain(&sources);
    }
}

#[test]
fn pairs_of_f32() {
    let a = floats(Type::F32, 36);
    let mut b = a.clone();
    b.rotate_left(17);
    for to in [Type::F16X2, Type::BF16X2].into_iter().chain(NARROW) {
        let variants: &[(&str, Mode)] = if NARROW.contains(&to) {
            &[(".rn.satfinite", Mode::Rn), (".rn.satfinite.relu", Mode::Rn)]
        } else {
            &[
                (".rn", Mode::Rn),
                (".rz", Mode::Rz),
                (".rn.relu", Mode::Rn),
                (".rz.relu", Mode::Rz),
                (".rn.satfinite", Mode::Rn),
                (".rz.relu.satfinite", Mode::Rz),
            ]
        };
        for (modifiers, mode) in variants {
            let conversion = Conversion { to, from: Type::F32, mode: *mode, modifiers };
            let name = conversion.name();
            let inputs = [(Type::F32, a.as_slice()), (Type::F32, b.as_slice())];
            let got = run(&format!("{name} %out0, %in0, %in1;"), &inputs, &[register(to)]);
            for (i, got) in got[0].iter().enumerate() {
                // The first source is the upper half.
                let (upper, lower) = (conversion.expected(a[i]), conversion.expected(b[i]));
                let want = (upper << (to.bits() / 2) | lower) as u64;
                assert_eq!(*got, want, "{name} of {:x}, {:x}: {got:x}, not {want:x}", a[i], b[i]);
            }
        }
    }
}

#[test]
fn pairs_of_narrow_floats() {
    let all: Vec<u64> = (0..=0xffff).collect();
    for (narrow, wide) in NARROW.into_iter().flat_map(|n| [(n, Type::F16X2), (n, Type::BF16X2)]) {
        let mut conversions = vec![
            (".rn", narrow, wide),
            (".rn.relu", narrow, wide),
            (".rn.satfinite", wide, narrow),
            (".rn.satfinite.relu", wide, narrow),
        ];
        if (narrow, wide) == (Type::E5M2X2, Type::BF16X2) {
            // The one of the narrow formats that has an infinity.
            conversions.push((".rn.satfinite", narrow, wide));
        }
        for (modifiers, from, to) in conversions {
            let conversion = Conversion { to, from, mode: Mode::Rn, modifiers };
            let name = conversion.name();
            // Narrow ones in both places; of the wide ones all values in each half.
            let sources: Vec<u64> = if from == narrow {
                all.clone()
            } else {
                all.iter().map(|x| x | ((x * 40_503) & 0xffff) << 16).collect()
            };
            let got = run(&format!("{name} %out0, %in0;"), &[(register(from), &sources)], &[register(to)]);
            let bits = from.bits() / 2;
            for (x, got) in sources.iter().zip(&got[0]) {
                let element = |x: u64| conversion.expected(x & low(bits)) as u64;
                let want = element(*x) | element(x >> bits) << (to.bits() / 2);
                assert_eq!(*got, want, "{name} of {x:x}: {got:x}, not {want:x}");
            }
        }
    }
}

/// Powers of two, without a sign: the nearest above or below in 2^-127 to 2^127.
#[test]
fn powers_of_two() {
    let power = |e: u64| 2f64.powi(e as i32 - 127);
    let rounded = |x: f64, up: bool, held: bool| {
        let x = x.abs();
        let e = if up { (0..255).find(|e| power(*e) >= x) } else { (0..255).rev().find(|e| power(*e) <= x) };
        match e {
            _ if x.is_nan() => 0xff,
            _ if x.is_infinite() => 0xff - u64::from(held),
            Some(e) => e,
            // Nothing so great, or nothing so small.
            None if up => 0xff - u64::from(held),
            None => 0,
        }
    };
    let f32s = floats(Type::F32, 38);
    let mut others = f32s.clone();
    others.rotate_left(29);
    let bf16s: Vec<u64> = (0..=0xffff).map(|x| x | ((x * 40_503) & 0xffff) << 16).collect();
    let value = |bits: u64| f64::from(f32::from_bits(bits as u32));
    for (mode, up) in [(".rz", false), (".rp", true)] {
        for (saturates, held) in [("", false), (".satfinite", true)] {
            let name = format!("cvt{mode}{saturates}.ue8m0x2");
            let inputs = [(Type::F32, f32s.as_slice()), (Type::F32, others.as_slice())];
            let got = run(&format!("{name}.f32 %out0, %in0, %in1;"), &inputs, &[Type::B16]);
            for (i, got) in got[0].iter().enumerate() {
                let one = |bits: u64| rounded(value(bits), up, held);
                let want = one(f32s[i]) << 8 | one(others[i]);
                assert_eq!(*got, want, "{name}.f32 of {:x}, {:x}", f32s[i], others[i]);
            }
            let got =
                run(&format!("{name}.bf16x2 %out0, %in0;"), &[(Type::B32, bf16s.as_slice())], &[Type::B16]);
            for (x, got) in bf16s.iter().zip(&got[0]) {
                let one = |bits: u64| rounded(value((bits & 0xffff) << 16), up, held);
                assert_eq!(*got, one(x >> 16) << 8 | one(*x), "{name}.bf16x2 of {x:x}");
            }
        }
    }
    let all: Vec<u64> = (0..=0xffff).collect();
    let got = run("cvt.rn.bf16x2.ue8m0x2 %out0, %in0;", &[(Type::B16, all.as_slice())], &[Type::B32]);
    for (x, got) in all.iter().zip(&got[0]) {
        for (e, bits) in [(x & 0xff, got & 0xffff), (x >> 8, got >> 16)] {
            let right = if e == 0xff { bits == 0x7fff } else { value(bits << 16) == power(e) };
            assert!(right, "{e:x} gives {bits:x}");
        }
    }
}

#[test]
fn packed_integers() {
    let a = integers(37);
    let mut b = a.clone();
    b.rotate_left(13);
    let mut c = a.clone();
    c.rotate_left(41);
    let inputs = [(Type::B32, a.as_slice()), (Type::B32, b.as_slice()), (Type::B32, c.as_slice())];
    for (ty, bits, signed) in [
        ("u16", 16, false),
        ("s16", 16, true),
        ("u8", 8, false),
        ("s8", 8, true),
        ("u4", 4, false),
        ("s4", 4, true),
        ("u2", 2, false),
        ("s2", 2, true),
    ] {
        let (name, third) = if bits == 16 {
            (format!("cvt.pack.sat.{ty}.s32"), "")
        } else {
            (format!("cvt.pack.sat.{ty}.s32.b32"), ", %in2")
        };
        let got = run(&format!("{name} %out0, %in0, %in1{third};"), &inputs, &[Type::B32]);
        for (i, got) in got[0].iter().enumerate() {
            let (least, most) =
                if signed { (-(1i128 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) };
            let held = |x: u64| integer(Type::S32, x).clamp(least, most) as u64 & low(bits);
            let pair = held(a[i]) << bits | held(b[i]);
            let want = (if bits == 16 { pair } else { c[i] << (2 * bits) | pair }) & 0xffff_ffff;
            assert_eq!(*got, want, "{name} of {:x}, {:x}, {:x}: {got:x}, not {want:x}", a[i], b[i], c[i]);
        }
    }
}

#[test]
fn nan_to_integer() {
    // As the PTX ISA's table has it: zero, but 1 << (width - 1) from f64 and to 64 bits.
    for (from, nan) in [(Type::F16, 0x7e00), (Type::BF16, 0x7fc0), (Type::F32, F32.nan), (Type::F64, F64.nan)]
    {
        for (to, single, double) in [
            (Type::S8, 0, 0xff80),
            (Type::U8, 0, 0x80),
            (Type::S32, 0, 0x8000_0000),
            (Type::U32, 0, 0x8000_0000),
            (Type::S64, 1 << 63, 1 << 63),
            (Type::U64, 1 << 63, 1 << 63u64),
        ] {
            if from == Type::BF16 && to.bits() == 8 {
                continue;
            }
            let want = if from == Type::F64 { double } else { single };
            let body = format!("cvt.rzi{to}{from} %out0, %in0;");
            assert_eq!(run(&body, &[(from, &[nan])], &[register(to)])[0][0], want, "{body}");
        }
    }
}
