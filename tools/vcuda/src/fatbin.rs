//! Fat binaries: what nvcc puts into a program, machine code and PTX for several architectures.
//!
//! A container is a header of 16 bytes (magic, version and bytes of the header as 16 bits, bytes behind it as 64 bits) and
//! entries. An entry's header, of at least 64 bytes, has: at 0 its kind (1 PTX, 2 ELF), at 4 its bytes, at 8 the bytes of the
//! payload with padding, at 16 those of a compressed payload, at 28 the architecture, at 40 flags, at 56 the bytes when
//! decompressed. NVIDIA documents none of this; it is what `fatbinary` writes.

use std::fmt;
use std::io::Read as _;

/// The first four bytes of a container.
pub const MAGIC: u32 = 0xba55_ed50;
/// The first four bytes of what a program registers, which points to a container.
pub const WRAPPER: u32 = 0x4662_43b1;
/// Bytes of a container's header.
pub const HEADER: usize = 16;
/// Bytes of an entry's header that are read.
const ENTRY: usize = 64;
/// Most bytes of PTX, so that a broken header asks for no more memory than there is.
const MAX_BYTES: u64 = 1 << 30;

const LZ4: u64 = 0x2000;
const ZSTD: u64 = 0x8000;

/// Why a container has nothing for a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bad {
    /// It is no container, or a broken one.
    Broken(&'static str),
    /// No PTX: the architectures of its machine code.
    OnlyCode(Vec<u32>),
    /// Its PTX is for newer devices: the architectures.
    Newer(Vec<u32>),
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |all: &[u32]| all.iter().map(|arch| format!("sm_{arch}")).collect::<Vec<_>>().join(", ");
        match self {
            Self::Broken(what) => write!(f, "the fat binary is broken: {what}; build the program anew"),
            Self::OnlyCode(all) if all.is_empty() => {
                write!(
                    f,
                    "the program has no device code of its own here; a virtual GPU needs PTX: build without -rdc=true, \
                    with -arch=compute_80"
                )
            }
            Self::OnlyCode(all) => write!(
                f,
                "the program holds machine code alone (for {}), and a virtual GPU runs PTX: build with -arch=compute_80, or \
                 -gencode arch=compute_80,code=compute_80 beside what there is, and without -rdc=true",
                list(all)
            ),
            Self::Newer(all) => {
                let least = all.iter().min().copied().unwrap_or(0);
                let (major, minor) = (least / 10, least % 10);
                write!(
                    f,
                    "the program's PTX is for {}, newer than the virtual GPU: set VCUDA_CAPABILITY={major}.{minor}, or build \
                     with -arch=compute_80",
                    list(all)
                )
            }
        }
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let mut all = [0; 8];
    all[..N].copy_from_slice(bytes.get(at..at + N)?);
    Some(u64::from_le_bytes(all))
}

/// Bytes of a container, by its header.
pub fn size(header: &[u8; HEADER]) -> Option<usize> {
    let magic = number::<4>(header, 0)? == u64::from(MAGIC);
    let size = number::<2>(header, 6)?.checked_add(number::<8>(header, 8)?)?;
    usize::try_from(size).ok().filter(|size| magic && *size <= isize::MAX as usize)
}

/// The PTX of a container for a device: of what it may run, that for the newest architecture, with that.
///
/// # Errors
/// [`Bad`].
pub fn ptx(container: &[u8], (major, minor): (i32, i32)) -> Result<(u32, String), Bad> {
    const CUT: Bad = Bad::Broken("it ends too early");
    let header = container.first_chunk().and_then(size).ok_or(Bad::Broken("it has another beginning"))?;
    let mut rest = container.get(..header).ok_or(CUT)?;
    rest = rest.get(number::<2>(container, 6).ok_or(CUT)? as usize..).ok_or(CUT)?;
    let (mut code, mut newer) = (Vec::new(), Vec::new());
    let mut best: Option<(u32, &[u8], u64, u64, u64)> = None;
    while rest.len() >= ENTRY {
        let field = |at: usize| number::<4>(rest, at).unwrap_or(0);
        let wide = |at: usize| number::<8>(rest, at).unwrap_or(0);
        let (kind, head, bytes) = (number::<2>(rest, 0).unwrap_or(0), field(4), wide(8));
        let (arch, flags) = (field(28) as u32, wide(40));
        let end = head.checked_add(bytes).and_then(|end| usize::try_from(end).ok()).ok_or(CUT)?;
        let payload = rest.get(head as usize..end).filter(|_| head as usize >= ENTRY).ok_or(CUT)?;
        if kind == 1 {
            if arch > (major * 10 + minor) as u32 {
                newer.push(arch);
            } else if best.is_none_or(|(other, ..)| arch > other) {
                best = Some((arch, payload, flags, field(16), wide(56)));
            }
        } else if kind == 2 {
            code.push(arch);
        }
        rest = &rest[end..];
    }
    let Some((arch, payload, flags, packed, bytes)) = best else {
        return Err(if newer.is_empty() { Bad::OnlyCode(code) } else { Bad::Newer(newer) });
    };
    let text = if flags & (LZ4 | ZSTD) == 0 {
        payload.to_vec()
    } else {
        let packed = payload.get(..packed as usize).ok_or(CUT)?;
        if bytes > MAX_BYTES {
            return Err(Bad::Broken("its PTX is larger than a gibibyte"));
        }
        if flags & LZ4 != 0 {
            lz4_flex::block::decompress(packed, bytes as usize)
                .map_err(|_| Bad::Broken("its LZ4 data is damaged"))?
        } else {
            let mut text = Vec::new();
            ruzstd::decoding::StreamingDecoder::new(packed)
                .ok()
                .and_then(|decoder| decoder.take(bytes).read_to_end(&mut text).ok())
                .ok_or(Bad::Broken("its zstd data is damaged"))?;
            text
        }
    };
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    String::from_utf8(text[..end].to_vec())
        .map(|text| (arch, text))
        .map_err(|_| Bad::Broken("its PTX is no text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: u16, arch: u32, flags: u64, payload: &[u8], bytes: usize) -> Vec<u8> {
        let mut all = vec![0; ENTRY];
        all[..2].copy_from_slice(&kind.to_le_bytes());
        all[4..8].copy_from_slice(&64u32.to_le_bytes());
        all[8..16].copy_from_slice(&(payload.len().next_multiple_of(8) as u64).to_le_bytes());
        all[16..20].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        all[28..32].copy_from_slice(&arch.to_le_bytes());
        all[40..48].copy_from_slice(&flags.to_le_bytes());
        all[56..64].copy_from_slice(&(bytes as u64).to_le_bytes());
        all.extend(payload);
        all.resize(all.len().next_multiple_of(8), 0);
        all
    }

    fn container(entries: &[Vec<u8>]) -> Vec<u8> {
        let body = entries.concat();
        let mut all = MAGIC.to_le_bytes().to_vec();
        all.extend([1, 0, 16, 0]);
        all.extend((body.len() as u64).to_le_bytes());
        all.extend(body);
        all
    }

    #[test]
    fn the_newest_that_the_device_runs_is_taken() {
        let text = ".version 8.0 ".repeat(30);
        let packed = lz4_flex::block::compress(text.as_bytes());
        let plain = |arch: u32| entry(1, arch, 0, format!("for {arch}").as_bytes(), 0);
        let all = container(&[
            entry(2, 90, 0, b"code", 0),
            plain(70),
            entry(1, 80, LZ4, &packed, text.len()),
            plain(90),
        ]);
        assert_eq!(ptx(&all, (8, 6)), Ok((80, text)));
        assert_eq!(ptx(&all, (7, 5)), Ok((70, "for 70".to_owned())));
        assert_eq!(ptx(&all, (9, 0)), Ok((90, "for 90".to_owned())));
        assert_eq!(ptx(&all, (6, 0)), Err(Bad::Newer(vec![70, 80, 90])));
        let code = container(&[entry(2, 80, 0, b"code", 0), entry(2, 90, 0, b"code", 0)]);
        assert_eq!(ptx(&code, (8, 0)), Err(Bad::OnlyCode(vec![80, 90])));
    }

    #[test]
    fn broken_ones_are_told_and_never_a_panic() {
        let text = ".version 8.0 ".repeat(30);
        let packed = lz4_flex::block::compress(text.as_bytes());
        let whole = container(&[entry(1, 80, LZ4, &packed, text.len()), entry(1, 75, ZSTD, b"nothing", 90)]);
        assert!(matches!(ptx(&whole, (7, 5)), Err(Bad::Broken("its zstd data is damaged"))));
        for cut in 0..whole.len() {
            assert!(ptx(&whole[..cut], (8, 0)).is_err(), "{cut}");
        }
        let mut random = 1u64;
        for _ in 0..20_000 {
            let mut one = whole.clone();
            for _ in 0..3 {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (random >> 33) as usize % one.len();
                one[at] = (random >> 20) as u8;
            }
            let _ = ptx(&one, (8, 0));
        }
    }
}
