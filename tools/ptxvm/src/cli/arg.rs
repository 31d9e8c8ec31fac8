//! Arguments of a kernel, as the command line gives them.

use std::path::PathBuf;
use std::str::FromStr;

use super::npy::Header;
use super::number::Element;

/// One `--arg`.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// As it was written.
    pub(crate) text: String,
    /// The argument.
    pub(crate) value: Value,
}

/// An argument.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// The parameter's bytes.
    Bytes(Vec<u8>),
    /// The null pointer.
    Null,
    /// Memory with a file's content, saved after the launch where a place is given.
    Load(PathBuf, Option<Save>),
    /// Uninitialised memory, saved after the launch.
    Out(Save, Element, Vec<u64>, u64),
    /// So many bytes of zeros.
    Zeros(u64),
    /// So many uninitialised bytes.
    Scratch(u64),
}

/// Where a buffer goes after the launch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Save {
    /// To standard output, as text.
    Print,
    /// To a file; its name says whether it is an npy.
    File(PathBuf),
}

impl From<&str> for Save {
    fn from(path: &str) -> Self {
        if path == "-" { Self::Print } else { Self::File(path.into()) }
    }
}

const FORMS: &str = "give a number (i32:5, f32:1.5, ...), bytes:HEX, in:FILE, out:FILE:TYPE[SHAPE], inout:FILE:FILE, \
                     zeros:BYTES, scratch:BYTES or null";

impl FromStr for Spec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self { text: text.to_owned(), value: value(text)? })
    }
}

impl Spec {
    /// Bytes that it takes among the parameters.
    pub(crate) fn bytes(&self) -> usize {
        match &self.value {
            Value::Bytes(bytes) => bytes.len(),
            _ => 8,
        }
    }
}

fn value(text: &str) -> Result<Value, String> {
    if text == "null" {
        return Ok(Value::Null);
    }
    let (kind, rest) = text.split_once(':').ok_or(FORMS)?;
    let path = |path: &str, example: &str| match path {
        "" => Err(format!("a file is missing, as in {example}")),
        path => Ok(path.to_owned()),
    };
    match kind {
        "bytes" => hex(rest).map(Value::Bytes),
        "zeros" => size(rest).map(Value::Zeros),
        "scratch" => size(rest).map(Value::Scratch),
        "in" => Ok(Value::Load(path(rest, "in:x.npy")?.into(), None)),
        "out" => {
            let example = "out:y.npy:f32[128,64]";
            let (to, array) =
                rest.rsplit_once(':').ok_or(format!("type and shape are missing, as in {example}"))?;
            let (element, shape) = array
                .strip_suffix(']')
                .and_then(|array| array.split_once('['))
                .ok_or(format!("`{array}` is no type and shape, as in {example}"))?;
            let element = named(element)?;
            let shape: Vec<u64> = shape
                .split(',')
                .map(|n| n.parse().map_err(|_| format!("`{n}` is no dimension, as in {example}")))
                .collect::<Result<_, _>>()?;
            if shape.len() > 32 {
                return Err(format!("{} dimensions; NumPy has at most 32", shape.len()));
            }
            let bytes = Header::new(element, &shape).data_bytes();
            let bytes = bytes.filter(|n| *n <= i64::MAX as u64).ok_or(format!("`{array}` is too large"))?;
            Ok(Value::Out(path(to, example)?.as_str().into(), element, shape, bytes))
        }
        "inout" => {
            let example = "inout:x.npy:y.npy";
            let mut parts = rest.split(':');
            let (Some(from), Some(to), None) = (parts.next(), parts.next(), parts.next()) else {
                return Err(format!("two files are needed, without a colon in their names, as in {example}"));
            };
            Ok(Value::Load(path(from, example)?.into(), Some(path(to, example)?.as_str().into())))
        }
        _ if Element::from_name(kind).is_some() => named(kind)?.parse(rest).map(Value::Bytes),
        _ => Err(format!("`{kind}:` is unknown; {FORMS}")),
    }
}

fn named(name: &str) -> Result<Element, String> {
    Element::from_name(name)
        .ok_or_else(|| format!("`{name}` is no type; there are {}", Element::NAMES.join(" ")))
}

fn size(text: &str) -> Result<u64, String> {
    let size = text.parse().ok().filter(|n| *n <= i64::MAX as u64);
    size.ok_or_else(|| format!("`{text}` is no number of bytes, as in zeros:4096"))
}

fn hex(text: &str) -> Result<Vec<u8>, String> {
    let wrong = || format!("`{text}` are no bytes, two hexadecimal digits each, as in bytes:00ff12");
    let digits = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<Vec<u8>>>();
    let digits = digits.filter(|d| !d.is_empty() && d.len().is_multiple_of(2)).ok_or_else(wrong)?;
    Ok(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}
