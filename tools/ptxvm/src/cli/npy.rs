//! NumPy's file format, versions 1 to 3: arrays of numbers, little-endian, in C order.

use super::number::Element;

/// The header of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// NumPy's name of the element type, such as `<f4`.
    pub(crate) descr: String,
    /// Bytes of an element.
    pub(crate) item: usize,
    pub(crate) shape: Vec<u64>,
}

const MAGIC: &[u8] = b"\x93NUMPY";

impl Header {
    pub(crate) fn new(element: Element, shape: &[u64]) -> Self {
        Self { descr: element.npy().to_owned(), item: element.bytes(), shape: shape.to_vec() }
    }

    /// Bytes of the array; `None` above 64 bits.
    pub(crate) fn data_bytes(&self) -> Option<u64> {
        self.shape.iter().try_fold(self.item as u64, |all, n| all.checked_mul(*n))
    }

    /// The header of version 1 as bytes; the data follow at a multiple of 64.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let dims: String = self.shape.iter().map(|n| format!("{n}, ")).collect();
        // A tuple of one has a comma behind it, longer ones do not.
        let dims = if self.shape.len() == 1 { dims.trim_end() } else { dims.trim_end_matches(", ") };
        let dict = format!("{{'descr': '{}', 'fortran_order': False, 'shape': ({dims}), }}", self.descr);
        let length = (MAGIC.len() + 4 + dict.len() + 1).next_multiple_of(64) - MAGIC.len() - 4;
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        // At most 32 dimensions of 20 digits each.
        bytes.extend((length as u16).to_le_bytes());
        bytes.extend(format!("{dict:<width$}\n", width = length - 1).bytes());
        bytes
    }
}

/// Splits a file into its header and the array's bytes.
pub(crate) fn read(file: &[u8]) -> Result<(Header, &[u8]), String> {
    let rest = file.strip_prefix(MAGIC).ok_or("no npy file; call it .raw if it holds the bytes alone")?;
    let cut = || "the header is cut off".to_owned();
    let (version, rest) = rest.split_first_chunk::<2>().ok_or_else(cut)?;
    let (length, rest) = match version {
        [1, 0] => rest.split_first_chunk().map(|(n, rest)| (u16::from_le_bytes(*n) as usize, rest)),
        [2 | 3, 0] => rest.split_first_chunk().map(|(n, rest)| (u32::from_le_bytes(*n) as usize, rest)),
        [major, minor] => return Err(format!("npy version {major}.{minor}; versions 1 to 3 are read")),
    }
    .ok_or_else(cut)?;
    let (header, data) = rest.split_at_checked(length).ok_or_else(cut)?;
    let header = std::str::from_utf8(header).map_err(|_| "the header is no text")?;
    let header = parse(header)?;
    let expected = header.data_bytes();
    if expected != Some(data.len() as u64) {
        let Header { descr, shape, .. } = &header;
        return Err(format!("{} bytes of data, which do not make {descr} of shape {shape:?}", data.len()));
    }
    Ok((header, data))
}

/// Reads `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`, in any order.
fn parse(text: &str) -> Result<Header, String> {
    let mut at = Cursor(text);
    let (mut descr, mut shape) = (None, None);
    at.expect('{')?;
    while !at.take('}') {
        let key = at.string()?;
        at.expect(':')?;
        match key {
            "descr" => {
                descr = Some(at.string().map_err(|_| "only arrays of numbers are read, no structures")?)
            }
            "fortran_order" => {
                if at.word() != "False" {
                    return Err("an array in Fortran order; save numpy.ascontiguousarray(x)".into());
                }
            }
            "shape" => shape = Some(at.tuple()?),
            _ => return Err(format!("the header has an unknown key `{}`", key.escape_debug())),
        }
        if !at.take(',') {
            at.expect('}')?;
            break;
        }
    }
    let (Some(descr), Some(shape)) = (descr, shape) else {
        return Err("the header lacks `descr` or `shape`".into());
    };
    let item = item(descr)?;
    Ok(Header { descr: descr.to_owned(), item, shape })
}

/// Bytes of an element of NumPy's type name.
fn item(descr: &str) -> Result<usize, String> {
    let wrong = || format!("element type `{}`; only numbers are read", descr.escape_debug());
    let mut chars = descr.chars();
    let (order, kind) = (chars.next(), chars.next());
    let bytes: usize = chars.as_str().parse().map_err(|_| wrong())?;
    match (order, kind) {
        (Some('>'), _) if bytes > 1 => {
            Err("big-endian numbers; save x.astype(x.dtype.newbyteorder('<'))".into())
        }
        (Some('<' | '|' | '=' | '>'), Some('b' | 'i' | 'u' | 'f' | 'c' | 'V'))
            if (1..=16).contains(&bytes) =>
        {
            Ok(bytes)
        }
        _ => Err(wrong()),
    }
}

struct Cursor<'a>(&'a str);

impl<'a> Cursor<'a> {
    fn skip(&mut self) {
        self.0 = self.0.trim_start();
    }

    fn take(&mut self, c: char) -> bool {
        self.skip();
        self.0.strip_prefix(c).map(|rest| self.0 = rest).is_some()
    }

    fn expect(&mut self, c: char) -> Result<(), String> {
        if self.take(c) {
            return Ok(());
        }
        let there: String = self.0.chars().take(12).collect();
        Err(format!("the header has `{}` where `{c}` should be", there.escape_debug()))
    }

    fn string(&mut self) -> Result<&'a str, String> {
        let quote = if self.take('"') {
            '"'
        } else {
            self.expect('\'')?;
            '\''
        };
        let (text, rest) = self.0.split_once(quote).ok_or("the header has a string without an end")?;
        self.0 = rest;
        Ok(text)
    }

    fn word(&mut self) -> &'a str {
        self.skip();
        let end = self.0.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(self.0.len());
        let (word, rest) = self.0.split_at(end);
        self.0 = rest;
        word
    }

    fn tuple(&mut self) -> Result<Vec<u64>, String> {
        self.expect('(')?;
        let mut dims = Vec::new();
        while !self.take(')') {
            let word = self.word();
            dims.push(word.parse().map_err(|_| format!("the header has a dimension `{word}`"))?);
            if dims.len() > 64 {
                return Err("more than 64 dimensions".into());
            }
            if !self.take(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(dims)
    }
}
