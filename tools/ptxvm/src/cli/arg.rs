//! Arguments of a kernel, as the command line gives them.

use std::path::PathBuf;
use std::str::FromStr;

use ptxvm::{Swizzle, TENSOR_MAP_BYTES, TensorMap, TensorMapError, TensorType, Tiled};

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
    /// A pointer to memory.
    Memory(Memory),
    /// A tensor map of memory.
    Map(Tensor, Memory),
}

/// Memory of the device.
#[derive(Clone, Debug)]
pub(crate) enum Memory {
    /// With a file's content, saved after the launch where a place is given.
    Load(PathBuf, Option<Save>),
    /// Uninitialised, saved after the launch.
    Out(Save, Element, Vec<u64>, u64),
    /// So many bytes of zeros.
    Zeros(u64),
    /// So many uninitialised bytes.
    Scratch(u64),
}

/// A dense tensor and a box of it, outermost dimensions first.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    element: Element,
    dims: Vec<u64>,
    boxes: Vec<u64>,
    swizzle: Swizzle,
}

impl Tensor {
    /// The map's bytes for memory at an address.
    pub(crate) fn encode(&self, address: u64) -> Result<Vec<u8>, TensorMapError> {
        let ty = match self.element {
            // Copies do not look at signs.
            Element::I8 | Element::U8 => TensorType::U8,
            Element::I16 | Element::U16 => TensorType::U16,
            Element::I32 => TensorType::S32,
            Element::U32 => TensorType::U32,
            Element::I64 => TensorType::S64,
            Element::U64 => TensorType::U64,
            Element::F16 => TensorType::F16,
            Element::Bf16 => TensorType::Bf16,
            Element::F32 => TensorType::F32,
            Element::F64 => TensorType::F64,
        };
        let dims: Vec<u64> = self.dims.iter().rev().copied().collect();
        let strides: Vec<u64> = dims
            .iter()
            .scan(self.element.bytes() as u64, |stride, n| {
                *stride = stride.saturating_mul(*n);
                Some(*stride)
            })
            .take(dims.len() - 1)
            .collect();
        let boxes: Vec<u32> =
            self.boxes.iter().rev().map(|n| u32::try_from(*n).unwrap_or(u32::MAX)).collect();
        let map = TensorMap::encode(&Tiled {
            ty,
            address,
            dims: &dims,
            strides: &strides,
            boxes: &boxes,
            element_strides: &vec![1; dims.len()],
            swizzle: self.swizzle,
            fill_nan: false,
        });
        map.map(Vec::from)
    }
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
                     zeros:BYTES, scratch:BYTES, map:TYPE[SHAPE]:box[SHAPE]:SWIZZLE:MEMORY or null";

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
            Value::Map(..) => TENSOR_MAP_BYTES,
            _ => 8,
        }
    }

    /// The memory that it stands for, if any.
    pub(crate) fn memory(&self) -> Option<&Memory> {
        match &self.value {
            Value::Memory(memory) | Value::Map(_, memory) => Some(memory),
            Value::Bytes(_) | Value::Null => None,
        }
    }
}

/// `TYPE[SHAPE]`
fn array(text: &str, example: &str) -> Result<(Element, Vec<u64>), String> {
    let (element, shape) = text
        .strip_suffix(']')
        .and_then(|array| array.split_once('['))
        .ok_or(format!("`{text}` is no type and shape, as in {example}"))?;
    Ok((named(element)?, dimensions(shape, example)?))
}

fn dimensions(text: &str, example: &str) -> Result<Vec<u64>, String> {
    let number = |n: &str| n.parse().map_err(|_| format!("`{n}` is no dimension, as in {example}"));
    text.split(',').map(number).collect()
}

fn map(text: &str) -> Result<Value, String> {
    let example = "map:f16[256,512]:box[64,64]:128:in:x.npy";
    let mut parts = text.splitn(4, ':');
    let (Some(of), Some(boxes), Some(swizzle), Some(memory)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(format!("a tensor, a box, a swizzle and memory are needed, as in {example}"));
    };
    let (element, dims) = array(of, example)?;
    let boxes = boxes.strip_prefix("box[").and_then(|rest| rest.strip_suffix(']'));
    let boxes = dimensions(boxes.ok_or(format!("the box is missing, as in {example}"))?, example)?;
    let swizzle = match swizzle {
        "0" => Swizzle::None,
        "32" => Swizzle::B32,
        "64" => Swizzle::B64,
        "128" => Swizzle::B128,
        other => return Err(format!("a swizzle of `{other}` bytes: there are 0, 32, 64 and 128")),
    };
    let Value::Memory(memory) = value(memory)? else {
        return Err(format!("`{memory}` is no memory to map, as in {example}"));
    };
    let tensor = Tensor { element, dims, boxes, swizzle };
    // What the map's rules refuse is told before any file is read.
    tensor.encode(TENSOR_MAP_BYTES as u64).map_err(|e| format!("{e} (dimension 0 is the innermost)"))?;
    Ok(Value::Map(tensor, memory))
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
        "zeros" => size(rest).map(|n| Value::Memory(Memory::Zeros(n))),
        "scratch" => size(rest).map(|n| Value::Memory(Memory::Scratch(n))),
        "map" => map(rest),
        "in" => Ok(Value::Memory(Memory::Load(path(rest, "in:x.npy")?.into(), None))),
        "out" => {
            let example = "out:y.npy:f32[128,64]";
            let (to, array) =
                rest.rsplit_once(':').ok_or(format!("type and shape are missing, as in {example}"))?;
            let (element, shape) = self::array(array, example)?;
            if shape.len() > 32 {
                return Err(format!("{} dimensions; NumPy has at most 32", shape.len()));
            }
            let bytes = Header::new(element, &shape).data_bytes();
            let bytes = bytes.filter(|n| *n <= i64::MAX as u64).ok_or(format!("`{array}` is too large"))?;
            Ok(Value::Memory(Memory::Out(path(to, example)?.as_str().into(), element, shape, bytes)))
        }
        "inout" => {
            let example = "inout:x.npy:y.npy";
            let mut parts = rest.split(':');
            let (Some(from), Some(to), None) = (parts.next(), parts.next(), parts.next()) else {
                return Err(format!("two files are needed, without a colon in their names, as in {example}"));
            };
            Ok(Value::Memory(Memory::Load(
                path(from, example)?.into(),
                Some(path(to, example)?.as_str().into()),
            )))
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
