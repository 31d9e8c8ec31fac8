//! Functions that CUDA's runtime gives to device code: `printf`, `assert`, `malloc` and `free`.

use super::context::{Context, Stop};
use super::inst::System;
use super::layout::{CONST_WINDOW, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BYTES};
use super::registers::LANES;
use crate::error::ErrorKind;

/// Longest string that is read from a kernel.
const MAX_TEXT: usize = 1 << 12;
/// Longest field that a conversion may ask for.
const MAX_WIDTH: usize = 1 << 10;

/// Calls a system function for the lanes of `mask`, lane after lane. `args` and `results` are places in the caller's
/// frame: offset and bytes.
pub(crate) fn call(
    ctx: &mut Context<'_>,
    function: System,
    args: &[(u32, u32)],
    results: &[(u32, u32)],
    mask: u32,
) -> Result<(), Stop> {
    let (arity, name) = match function {
        System::Vprintf => (2, "vprintf"),
        System::AssertFail => (5, "__assertfail"),
        System::Malloc => (1, "malloc"),
        System::Free => (1, "free"),
    };
    let fits = |wanted: usize, (_, bytes): &(u32, u32)| *bytes as usize == wanted;
    if args.len() != arity || results.len() > 1 {
        let message = format!("`{name}` takes {arity} arguments, {} are given", args.len());
        return Err(ctx.fault(ErrorKind::Invalid, mask, message));
    }
    for lane in (0..LANES).filter(|i| mask >> i & 1 != 0) {
        let arg = |i: usize| -> u64 {
            let (at, bytes) = args[i];
            let at = u64::from(ctx.warp.frame().local_base + at);
            if fits(4, &args[i]) {
                u64::from(ctx.warp.local.read::<u32>(at, lane))
            } else {
                read_u64(ctx, at, bytes, lane)
            }
        };
        let result = match function {
            System::Vprintf => {
                let format = text(ctx, arg(0), lane)?;
                let (line, count) = format_text(ctx, &format, arg(1), lane)?;
                ctx.worker.printed.push((ctx.block.order, line));
                count
            }
            System::AssertFail => {
                let [message, file, place] = [arg(0), arg(1), arg(3)];
                let line = arg(2) as u32;
                let (message, file, place) =
                    (text(ctx, message, lane)?, text(ctx, file, lane)?, text(ctx, place, lane)?);
                let message = format!("{file}:{line}: {place}: the assertion `{message}` failed");
                return Err(ctx.fault(ErrorKind::Trap, 1 << lane, message));
            }
            System::Malloc => {
                let bytes = arg(0);
                let at = ctx.launch.heap(|heap| heap.malloc(bytes));
                if at != 0 {
                    ctx.launch.memory.heap_block(at, bytes.max(1), true);
                }
                at
            }
            System::Free => {
                let address = arg(0);
                if let Some(bytes) = ctx.launch.heap(|heap| heap.free(address)) {
                    ctx.launch.memory.heap_block(address, bytes, false);
                } else if address != 0 {
                    let message =
                        format!("free({address:#x}): `malloc` gave no such block, or it was freed before");
                    return Err(ctx.fault(ErrorKind::UseAfterFree, 1 << lane, message));
                }
                0
            }
        };
        if let Some((at, bytes)) = results.first() {
            let at = u64::from(ctx.warp.frame().local_base + at);
            match bytes {
                4 => ctx.warp.local.write(at, lane, result as u32, true),
                8 => ctx.warp.local.write(at, lane, result, true),
                _ => return Err(ctx.fault(ErrorKind::Invalid, mask, format!("`{name}` gives 4 or 8 bytes"))),
            }
        }
    }
    Ok(())
}

fn read_u64(ctx: &Context<'_>, at: u64, bytes: u32, lane: usize) -> u64 {
    (0..u64::from(bytes.min(8)))
        .fold(0, |all, i| all | u64::from(ctx.warp.local.read::<u8>(at + i, lane)) << (8 * i))
}

/// Bytes at a generic address, as one lane sees them.
fn read(ctx: &Context<'_>, address: u64, to: &mut [u8], lane: usize) -> Result<(), Stop> {
    let within = |window: u64| address.checked_sub(window).filter(|at| *at < WINDOW_BYTES);
    let bytes = to.len();
    let outside = || {
        let message = format!("{bytes} bytes at {address:#x}, which a system function reads");
        Err(ctx.fault(ErrorKind::OutOfBounds, 1 << lane, message))
    };
    let end = |at: u64| at + bytes as u64;
    if let Some(at) = within(LOCAL_WINDOW) {
        if end(at) > ctx.warp.local.bytes() {
            return outside();
        }
        (0..).zip(to.iter_mut()).for_each(|(i, b)| *b = ctx.warp.local.read(at + i, lane));
    } else if let Some(at) = within(SHARED_WINDOW).map(|at| at.wrapping_sub(ctx.block.shared_base())) {
        if at > ctx.block.shared.len() || end(at) > ctx.block.shared.len() {
            return outside();
        }
        (0..).zip(to.iter_mut()).for_each(|(i, b)| *b = ctx.block.shared.read(at + i));
    } else if let Some((at, bank)) = within(CONST_WINDOW)
        .map(|at| (at, ctx.launch.constants))
        .or_else(|| within(PARAM_WINDOW).map(|at| (at, ctx.launch.params)))
    {
        let Some(bytes) = bank.get(at as usize..end(at) as usize) else { return outside() };
        to.copy_from_slice(bytes);
    } else if ctx.launch.memory.read(address, to).is_err() {
        return outside();
    }
    Ok(())
}

/// A string that ends in 0.
fn text(ctx: &Context<'_>, address: u64, lane: usize) -> Result<String, Stop> {
    let mut bytes = Vec::new();
    while bytes.len() < MAX_TEXT {
        let mut byte = [0];
        read(ctx, address.wrapping_add(bytes.len() as u64), &mut byte, lane)?;
        if byte[0] == 0 {
            break;
        }
        bytes.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A conversion of a format: `%-8.3f`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Conversion {
    left: bool,
    plus: bool,
    space: bool,
    alternate: bool,
    zeros: bool,
    width: usize,
    precision: Option<usize>,
    /// Bytes of an integer argument.
    size: u64,
    kind: char,
}

/// What `printf` makes of a format and its arguments, which lie one behind the other, each at a multiple of its size;
/// and how many there were.
fn format_text(ctx: &Context<'_>, format: &str, mut at: u64, lane: usize) -> Result<(String, u64), Stop> {
    let mut out = String::new();
    let mut count = 0;
    let mut next = |bytes: u64| -> Result<u64, Stop> {
        at = at.next_multiple_of(bytes);
        let mut value = [0; 8];
        read(ctx, at, &mut value[..bytes as usize], lane)?;
        at += bytes;
        count += 1;
        Ok(u64::from_le_bytes(value))
    };
    let mut rest = format.chars().peekable();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut conv = Conversion { size: 4, ..Conversion::default() };
        while let Some(flag) = rest.next_if(|c| "-+ #0".contains(*c)) {
            match flag {
                '-' => conv.left = true,
                '+' => conv.plus = true,
                ' ' => conv.space = true,
                '#' => conv.alternate = true,
                _ => conv.zeros = true,
            }
        }
        let mut number = |rest: &mut std::iter::Peekable<std::str::Chars<'_>>| -> Result<i64, Stop> {
            if rest.next_if_eq(&'*').is_some() {
                return Ok(i64::from(next(4)? as i32));
            }
            let mut n = 0i64;
            while let Some(digit) = rest.next_if(char::is_ascii_digit).and_then(|c| c.to_digit(10)) {
                n = (n * 10 + i64::from(digit)).min(MAX_WIDTH as i64);
            }
            Ok(n)
        };
        let width = number(&mut rest)?;
        conv.left |= width < 0;
        conv.width = (width.unsigned_abs() as usize).min(MAX_WIDTH);
        if rest.next_if_eq(&'.').is_some() {
            conv.precision = usize::try_from(number(&mut rest)?).ok().map(|p| p.min(MAX_WIDTH));
        }
        while let Some(length) = rest.next_if(|c| "hlLqjzt".contains(*c)) {
            if length != 'h' {
                conv.size = 8;
            }
        }
        conv.kind = rest.next().unwrap_or('%');
        let piece = match conv.kind {
            '%' => "%".to_owned(),
            'd' | 'i' => {
                let value = next(conv.size)?;
                let value = if conv.size == 8 { value as i64 } else { i64::from(value as i32) };
                integer(&conv, value < 0, value.unsigned_abs())
            }
            'u' | 'o' | 'x' | 'X' => integer(&conv, false, next(conv.size)?),
            'c' => pad(&conv, String::new(), char::from(next(4)? as u8).to_string(), false),
            'p' => pad(&conv, String::new(), format!("{:#x}", next(8)?), false),
            's' => {
                let address = next(8)?;
                let mut s = text(ctx, address, lane)?;
                if let Some(most) = conv.precision {
                    s = s.chars().take(most).collect();
                }
                pad(&conv, String::new(), s, false)
            }
            'f' | 'F' | 'e' | 'E' | 'g' | 'G' | 'a' | 'A' => float(&conv, f64::from_bits(next(8)?)),
            // An unknown conversion is printed as it stands, as CUDA does.
            other => format!("%{other}"),
        };
        out.push_str(&piece);
    }
    Ok((out, count))
}

/// Fills a field: sign or prefix, then the body, with blanks or zeros.
fn pad(conv: &Conversion, sign: String, body: String, zeros: bool) -> String {
    let have = sign.chars().count() + body.chars().count();
    let fill = conv.width.saturating_sub(have);
    match (conv.left, zeros) {
        (true, _) => format!("{sign}{body}{}", " ".repeat(fill)),
        (false, true) => format!("{sign}{}{body}", "0".repeat(fill)),
        (false, false) => format!("{}{sign}{body}", " ".repeat(fill)),
    }
}

fn sign(conv: &Conversion, negative: bool) -> String {
    match (negative, conv.plus, conv.space) {
        (true, ..) => "-",
        (false, true, _) => "+",
        (false, false, true) => " ",
        _ => "",
    }
    .to_owned()
}

fn integer(conv: &Conversion, negative: bool, value: u64) -> String {
    let mut digits = match conv.kind {
        'o' => format!("{value:o}"),
        'x' => format!("{value:x}"),
        'X' => format!("{value:X}"),
        _ => value.to_string(),
    };
    if let Some(least) = conv.precision {
        if least == 0 && value == 0 {
            digits.clear();
        }
        digits = "0".repeat(least.saturating_sub(digits.len())) + &digits;
    }
    let prefix = match conv.kind {
        'd' | 'i' => sign(conv, negative),
        'x' if conv.alternate && value != 0 => "0x".to_owned(),
        'X' if conv.alternate && value != 0 => "0X".to_owned(),
        'o' if conv.alternate && !digits.starts_with('0') => "0".to_owned(),
        _ => String::new(),
    };
    pad(conv, prefix, digits, conv.zeros && conv.precision.is_none())
}

fn float(conv: &Conversion, value: f64) -> String {
    let prefix = sign(conv, value.is_sign_negative());
    let size = value.abs();
    if !size.is_finite() {
        let body = if size.is_nan() { "nan" } else { "inf" };
        let body = if conv.kind.is_uppercase() { body.to_uppercase() } else { body.to_owned() };
        return pad(conv, prefix, body, false);
    }
    let precision = conv.precision.unwrap_or(6);
    let body = match conv.kind.to_ascii_lowercase() {
        'f' => fixed(size, precision, conv.alternate),
        'e' => scientific(size, precision, conv.alternate),
        'g' => {
            let precision = precision.max(1);
            let exponent = exponent_of(size, precision - 1);
            let (text, scale) = if (-4..precision as i64).contains(&exponent) {
                (fixed(size, (precision as i64 - 1 - exponent) as usize, conv.alternate), false)
            } else {
                (scientific(size, precision - 1, conv.alternate), true)
            };
            if conv.alternate { text } else { without_zeros(&text, scale) }
        }
        _ => hexadecimal(size, conv.precision),
    };
    let body = if conv.kind.is_uppercase() { body.to_uppercase() } else { body };
    pad(conv, prefix, body, conv.zeros)
}

fn fixed(size: f64, precision: usize, dot: bool) -> String {
    let text = format!("{size:.precision$}");
    if dot && precision == 0 { text + "." } else { text }
}

/// `d.ddde+XX`
fn scientific(size: f64, precision: usize, dot: bool) -> String {
    let text = format!("{size:.precision$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i64 = exponent.parse().unwrap_or(0);
    let dot = if dot && precision == 0 { "." } else { "" };
    format!("{digits}{dot}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// The decimal exponent that a number has once it is rounded to so many digits behind the first.
fn exponent_of(size: f64, precision: usize) -> i64 {
    let text = format!("{size:.precision$e}");
    text.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0)
}

/// Without the zeros at the end of the fraction.
fn without_zeros(text: &str, scientific: bool) -> String {
    let (digits, exponent) =
        if scientific { text.split_at(text.find('e').unwrap_or(text.len())) } else { (text, "") };
    if !digits.contains('.') {
        return text.to_owned();
    }
    format!("{}{exponent}", digits.trim_end_matches('0').trim_end_matches('.'))
}

/// `0x1.8p+1`
fn hexadecimal(size: f64, precision: Option<usize>) -> String {
    let bits = size.to_bits();
    let exponent = (bits >> 52) as i64;
    let mut mantissa = bits & ((1 << 52) - 1);
    let (mut lead, exponent) = match (exponent, mantissa) {
        (0, 0) => (0, 0),
        (0, _) => (0, -1022),
        _ => (1u64, exponent - 1023),
    };
    let mut digits = 13;
    if let Some(p) = precision.filter(|p| *p < 13) {
        let drop = 4 * (13 - p) as u32;
        let all = lead << 52 | mantissa;
        let half = 1u64 << (drop - 1);
        let rest = all & ((1 << drop) - 1);
        let up = rest > half || (rest == half && all >> drop & 1 == 1);
        let all = ((all >> drop) + u64::from(up)) << drop;
        (lead, mantissa) = (all >> 52, all & ((1 << 52) - 1));
        digits = p;
    }
    let fraction = format!("{mantissa:013x}");
    let fraction = match precision {
        None => fraction.trim_end_matches('0').to_owned(),
        Some(p) => fraction[..digits].to_owned() + &"0".repeat(p.saturating_sub(13)),
    };
    let dot = if fraction.is_empty() { "" } else { "." };
    format!("0x{lead}{dot}{fraction}p{exponent:+}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conv(kind: char) -> Conversion {
        Conversion { kind, size: 4, ..Conversion::default() }
    }

    #[test]
    fn numbers_as_c_prints_them() {
        let cases: [(Conversion, f64, &str); 14] = [
            (conv('f'), 3.5, "3.500000"),
            (Conversion { width: 8, precision: Some(2), ..conv('f') }, -1.005, "   -1.00"),
            (Conversion { width: 8, zeros: true, precision: Some(1), ..conv('f') }, -1.25, "-00001.2"),
            (conv('e'), 12345.678, "1.234568e+04"),
            (Conversion { precision: Some(0), ..conv('E') }, 9.5e-7, "1E-06"),
            (conv('g'), 0.0001, "0.0001"),
            (conv('g'), 0.00001, "1e-05"),
            (conv('g'), 1_000_000.0, "1e+06"),
            (conv('g'), 999_999.5, "1e+06"),
            (conv('g'), 123_456.0, "123456"),
            (Conversion { plus: true, ..conv('g') }, 100.0, "+100"),
            (conv('f'), f64::NEG_INFINITY, "-inf"),
            (conv('a'), 3.0, "0x1.8p+1"),
            (Conversion { precision: Some(1), ..conv('a') }, 1.999, "0x2.0p+0"),
        ];
        for (c, value, want) in cases {
            assert_eq!(float(&c, value), want, "{c:?} of {value}");
        }
        assert_eq!(integer(&Conversion { width: 6, zeros: true, ..conv('d') }, true, 42), "-00042");
        assert_eq!(integer(&Conversion { alternate: true, ..conv('x') }, false, 255), "0xff");
        assert_eq!(integer(&Conversion { precision: Some(4), width: 6, ..conv('u') }, false, 7), "  0007");
        assert_eq!(integer(&Conversion { left: true, width: 4, ..conv('o') }, false, 8), "10  ");
    }
}
