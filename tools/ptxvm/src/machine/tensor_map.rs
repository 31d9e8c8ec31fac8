//! Tensor maps: how the tensor copies (`cp.async.bulk.tensor`) address a tensor in global memory, and boxes of it.
//!
//! A map is 128 opaque bytes, as CUDA's `CUtensorMap`, in a layout of this machine's own: a mark, the fields, and a checksum,
//! so that bytes which [`TensorMap::encode`] did not make are found out. The rules are those of `cuTensorMapEncodeTiled` (CUDA
//! Driver API, "Tensor Map Object Management").

use std::fmt;

use crate::error::ErrorKind;

/// Bytes of a map.
pub const TENSOR_MAP_BYTES: usize = 128;

/// Most dimensions.
const RANK: usize = 5;

/// Element types, with the numbers of `CUtensorMapDataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorType {
    /// Unsigned, 1 byte.
    U8 = 0,
    /// Unsigned, 2 bytes.
    U16 = 1,
    /// Unsigned, 4 bytes.
    U32 = 2,
    /// Signed, 4 bytes.
    S32 = 3,
    /// Unsigned, 8 bytes.
    U64 = 4,
    /// Signed, 8 bytes.
    S64 = 5,
    /// IEEE half precision.
    F16 = 6,
    /// IEEE single precision.
    F32 = 7,
    /// IEEE double precision.
    F64 = 8,
    /// bfloat16.
    Bf16 = 9,
    /// Single precision, whose reductions flush subnormal numbers.
    F32Ftz = 10,
    /// tf32 in 4 bytes.
    Tf32 = 11,
    /// tf32 in 4 bytes, flushed.
    Tf32Ftz = 12,
}

impl TensorType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::U16,
        Self::U32,
        Self::S32,
        Self::U64,
        Self::S64,
        Self::F16,
        Self::F32,
        Self::F64,
        Self::Bf16,
        Self::F32Ftz,
        Self::Tf32,
        Self::Tf32Ftz,
    ];

    /// The type of a number of `CUtensorMapDataType`.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| *ty as u32 == number)
    }

    /// Bytes of an element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::U8 => 1,
            Self::U16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::S32 | Self::F32 | Self::F32Ftz | Self::Tf32 | Self::Tf32Ftz => 4,
            Self::U64 | Self::S64 | Self::F64 => 8,
        }
    }

    const fn is_float(self) -> bool {
        !matches!(self, Self::U8 | Self::U16 | Self::U32 | Self::S32 | Self::U64 | Self::S64)
    }

    /// The bytes of the NaN that fills what lies outside.
    const fn nan(self) -> &'static [u8] {
        match self {
            Self::F16 => &[0xff, 0x7f],
            Self::Bf16 => &[0xff, 0x7f],
            Self::F64 => &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
            _ => &[0xff, 0xff, 0xff, 0x7f],
        }
    }
}

/// How 16-byte pieces of a box are permuted in shared memory, with the numbers of `CUtensorMapSwizzle`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Swizzle {
    /// Not at all.
    #[default]
    None = 0,
    /// Bit 4 of the address is xored with bit 7.
    B32 = 1,
    /// Bits 4 and 5 with bits 7 and 8.
    B64 = 2,
    /// Bits 4 to 6 with bits 7 to 9.
    B128 = 3,
}

impl Swizzle {
    /// The mode of a number of `CUtensorMapSwizzle`, if it is built.
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::None, Self::B32, Self::B64, Self::B128].into_iter().find(|s| *s as u32 == number)
    }

    /// Bytes of a row of the pattern.
    const fn span(self) -> u64 {
        16 << self as u32
    }

    /// Where the byte goes that would lie at an address of shared memory.
    pub(crate) const fn apply(self, at: u64) -> u64 {
        at ^ (at >> 3 & (self.span() - 16))
    }
}

/// A tensor and a box of it, to be encoded. Dimension 0 is the innermost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiled<'a> {
    /// Type of the elements.
    pub ty: TensorType,
    /// Address of the first element.
    pub address: u64,
    /// Elements of each dimension.
    pub dims: &'a [u64],
    /// Bytes from one element to the next of each dimension but the innermost.
    pub strides: &'a [u64],
    /// Elements of the box.
    pub boxes: &'a [u32],
    /// Every how many elements of the box one is copied. That of dimension 0 is not used.
    pub element_strides: &'a [u32],
    /// The permutation in shared memory.
    pub swizzle: Swizzle,
    /// Whether loads fill what lies outside the tensor with NaN instead of zeros.
    pub fill_nan: bool,
}

/// Why a tensor map cannot be encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TensorMapError {
    /// `cuTensorMapEncodeTiled` refuses it as well: which argument, and its rule.
    Invalid(String),
    /// The machine does not have it.
    Unsupported(String),
}

impl fmt::Display for TensorMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(what) => write!(f, "no tensor map: {what}"),
            Self::Unsupported(what) => write!(f, "a tensor map that this machine does not have: {what}"),
        }
    }
}

impl std::error::Error for TensorMapError {}

impl TensorMapError {
    /// What it is where a kernel meets it.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid(_) => ErrorKind::TensorMap,
            Self::Unsupported(_) => ErrorKind::Unsupported,
        }
    }
}

/// A field of a map that kernels can replace (PTX ISA, `tensormap.replace`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    Address,
    /// Less 1.
    Rank,
    Box,
    Dim,
    Stride,
    ElementStride,
    Type,
    Interleave,
    Swizzle,
    Fill,
}

/// Element types in the order of PTX's numbers.
const PTX_TYPES: [TensorType; 13] = [
    TensorType::U8,
    TensorType::U16,
    TensorType::U32,
    TensorType::S32,
    TensorType::U64,
    TensorType::S64,
    TensorType::F16,
    TensorType::F32,
    TensorType::F32Ftz,
    TensorType::F64,
    TensorType::Bf16,
    TensorType::Tf32,
    TensorType::Tf32Ftz,
];

/// A tensor map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    pub(crate) ty: TensorType,
    pub(crate) rank: usize,
    pub(crate) swizzle: Swizzle,
    fill_nan: bool,
    address: u64,
    dims: [u64; RANK],
    /// That of dimension 0 is the element's size.
    strides: [u64; RANK],
    boxes: [u32; RANK],
    element_strides: [u32; RANK],
}

/// What 128 bytes of zeros are, from which kernels make a map field by field. A field that is 0 is one that was not given.
const BLANK: TensorMap = TensorMap {
    ty: TensorType::U8,
    rank: 1,
    swizzle: Swizzle::None,
    fill_nan: false,
    address: 0,
    dims: [0; RANK],
    strides: [1, 0, 0, 0, 0],
    boxes: [0; RANK],
    element_strides: [0; RANK],
};

const MARK: [u8; 8] = *b"ptxvmTM1";

impl TensorMap {
    /// Checks a tensor and its box, and encodes them.
    ///
    /// # Errors
    /// What `cuTensorMapEncodeTiled` refuses, and boxes narrower than their swizzle.
    pub fn encode(of: &Tiled<'_>) -> Result<[u8; TENSOR_MAP_BYTES], TensorMapError> {
        let invalid = |what: String| Err(TensorMapError::Invalid(what));
        let rank = of.dims.len();
        if rank == 0 || rank > RANK {
            return invalid(format!("{rank} dimensions: there may be 1 to {RANK}"));
        }
        if of.strides.len() != rank - 1 || of.boxes.len() != rank || of.element_strides.len() != rank {
            return invalid("strides, box and element strides must fit the dimensions".to_owned());
        }
        if !of.address.is_multiple_of(16) || of.address == 0 {
            return invalid(format!("the address {:#x} is no multiple of 16", of.address));
        }
        for (i, dim) in of.dims.iter().enumerate() {
            if *dim == 0 || *dim > 1 << 32 {
                return invalid(format!("dimension {i} has {dim} elements: it may have 1 to 2^32"));
            }
        }
        for (i, stride) in of.strides.iter().enumerate() {
            if !stride.is_multiple_of(16) || *stride >= 1 << 40 {
                return invalid(format!(
                    "the stride of dimension {} is {stride} bytes: it must be a multiple of 16 below 2^40",
                    i + 1
                ));
            }
        }
        for (i, n) in of.boxes.iter().enumerate() {
            if *n == 0 || *n > 256 {
                return invalid(format!("the box has {n} elements in dimension {i}: it may have 1 to 256"));
            }
        }
        for (i, n) in of.element_strides.iter().enumerate() {
            if *n == 0 || *n > 8 {
                return invalid(format!("element stride {n} of dimension {i}: it may be 1 to 8"));
            }
        }
        check_width(u64::from(of.boxes[0]) * of.ty.bytes(), of.swizzle)?;
        if of.fill_nan && !of.ty.is_float() {
            return invalid("integers are not filled with NaN".to_owned());
        }
        let row = |values: &[u64], first: u64| {
            std::array::from_fn(|i| if i == 0 { first } else { values.get(i - 1).copied().unwrap_or(0) })
        };
        let wide = |values: &[u32]| std::array::from_fn(|i| values.get(i).copied().unwrap_or(1));
        let map = Self {
            ty: of.ty,
            rank,
            swizzle: of.swizzle,
            fill_nan: of.fill_nan,
            address: of.address,
            dims: std::array::from_fn(|i| of.dims.get(i).copied().unwrap_or(1)),
            strides: row(of.strides, of.ty.bytes()),
            boxes: wide(of.boxes),
            element_strides: wide(of.element_strides),
        };
        Ok(map.to_bytes())
    }

    fn to_bytes(self) -> [u8; TENSOR_MAP_BYTES] {
        let mut all = Vec::with_capacity(TENSOR_MAP_BYTES);
        all.extend(MARK);
        all.extend([self.ty as u8, self.rank as u8, self.swizzle as u8, u8::from(self.fill_nan)]);
        all.extend(self.address.to_le_bytes());
        self.dims.iter().for_each(|n| all.extend(n.to_le_bytes()));
        self.strides[1..].iter().for_each(|n| all.extend(n.to_le_bytes()));
        self.boxes.iter().for_each(|n| all.extend((*n as u16).to_le_bytes()));
        self.element_strides.iter().for_each(|n| all.push(*n as u8));
        all.resize(TENSOR_MAP_BYTES - 4, 0);
        all.extend(checksum(&all).to_le_bytes());
        all.try_into().expect("as many bytes as a map has")
    }

    /// The map of bytes of [`TensorMap::encode`], or what is in the making if kernels changed them.
    pub fn decode(bytes: &[u8; TENSOR_MAP_BYTES]) -> Option<Self> {
        let (body, sum) = bytes.split_at(TENSOR_MAP_BYTES - 4);
        if body[..8] != MARK || checksum(body).to_le_bytes() != *sum {
            return None;
        }
        let short = |at: usize| u16::from_le_bytes(body[at..at + 2].try_into().expect("2 bytes"));
        let long = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("8 bytes"));
        let ty = TensorType::from_number(u32::from(body[8]))?;
        let rank = usize::from(body[9]);
        Some(Self {
            ty,
            rank: Some(rank).filter(|rank| (1..=RANK).contains(rank))?,
            swizzle: Swizzle::from_number(u32::from(body[10]))?,
            fill_nan: body[11] != 0,
            address: long(12),
            dims: std::array::from_fn(|i| long(20 + 8 * i)),
            strides: std::array::from_fn(|i| if i == 0 { ty.bytes() } else { long(60 + 8 * (i - 1)) }),
            boxes: std::array::from_fn(|i| u32::from(short(92 + 2 * i))),
            element_strides: std::array::from_fn(|i| u32::from(body[102 + i])),
        })
    }

    /// The same map of a tensor at another address.
    ///
    /// # Errors
    /// The bytes are no map, or the address is none that it can have.
    pub fn at_address(
        bytes: &[u8; TENSOR_MAP_BYTES],
        address: u64,
    ) -> Result<[u8; TENSOR_MAP_BYTES], String> {
        Self::decode(bytes).ok_or("the bytes are no tensor map of this machine")?;
        Self::replace(bytes, Field::Address, 0, address).map_err(|e| e.to_string())
    }

    /// The map with another value of a field, that of dimension `number` where there are several.
    pub(crate) fn replace(
        bytes: &[u8; TENSOR_MAP_BYTES],
        field: Field,
        number: usize,
        value: u64,
    ) -> Result<[u8; TENSOR_MAP_BYTES], TensorMapError> {
        let invalid = |what: String| Err(TensorMapError::Invalid(what));
        let blank = || Some(BLANK).filter(|_| *bytes == [0; TENSOR_MAP_BYTES]);
        let Some(mut map) = Self::decode(bytes).or_else(blank) else {
            return invalid("the bytes are none of this machine".to_owned());
        };
        let name = match field {
            Field::Address => "the address".to_owned(),
            Field::Rank => "the rank less 1".to_owned(),
            Field::Type => "the number of the element type".to_owned(),
            Field::Interleave => "the number of the interleaved layout".to_owned(),
            Field::Swizzle => "the number of the swizzle".to_owned(),
            Field::Fill => "the number of the fill".to_owned(),
            Field::Box => format!("dimension {number} of the box"),
            Field::Dim => format!("dimension {number}"),
            Field::Stride => format!("stride {number}"),
            Field::ElementStride => format!("element stride {number}"),
        };
        let small = |range: std::ops::RangeInclusive<u64>| match range.contains(&value) {
            true => Ok(value as u32),
            false => Err(TensorMapError::Invalid(format!("{name} becomes {value}: it may be {range:?}"))),
        };
        // What a GPU has beyond `most`, this machine has not.
        let built = |most: u64, all: u64| match small(0..=all)? {
            value if u64::from(value) <= most => Ok(value),
            value => Err(TensorMapError::Unsupported(format!("{name} becomes {value}"))),
        };
        match field {
            Field::Address if value == 0 || !value.is_multiple_of(16) => {
                return invalid(format!("the address becomes {value:#x}, no multiple of 16"));
            }
            Field::Address => map.address = value,
            Field::Rank => map.rank = small(0..=4)? as usize + 1,
            Field::Box => map.boxes[number] = small(1..=256)?,
            Field::Dim => map.dims[number] = u64::from(small(1..=u64::from(u32::MAX))?),
            Field::Stride if number == RANK - 1 => {
                return invalid(format!(
                    "there is no stride {number}: that of the innermost dimension is none of them"
                ));
            }
            Field::Stride if value >= 1 << 40 || !value.is_multiple_of(16) => {
                return invalid(format!("stride {number} becomes {value}, no multiple of 16 below 2^40"));
            }
            Field::Stride => map.strides[number + 1] = value,
            Field::ElementStride => map.element_strides[number] = small(1..=8)?,
            Field::Type => {
                map.ty = PTX_TYPES[built(12, 15)? as usize];
                map.strides[0] = map.ty.bytes();
            }
            Field::Interleave => _ = built(0, 2)?,
            Field::Swizzle => {
                built(3, 4)?;
                map.swizzle = Swizzle::from_number(value as u32).unwrap_or_default();
            }
            Field::Fill => map.fill_nan = small(0..=1)? == 1,
        }
        Ok(map.to_bytes())
    }

    /// Why copies cannot use a map that a kernel has made or changed.
    pub(crate) fn check(&self) -> Result<(), TensorMapError> {
        let invalid = |what: String| Err(TensorMapError::Invalid(what));
        let lacks = |i: usize| {
            let fields = [
                ("elements", self.dims[i]),
                ("elements of the box", self.boxes[i].into()),
                // That of dimension 0 is not used.
                ("element stride", if i == 0 { 1 } else { self.element_strides[i].into() }),
            ];
            fields.into_iter().find(|(_, value)| *value == 0).map(|(field, _)| (i, field))
        };
        if self.address == 0 {
            return invalid("it has no address".to_owned());
        }
        if let Some((i, field)) = (0..self.rank).find_map(lacks) {
            return invalid(format!("of its {} dimensions it lacks the {field} of dimension {i}", self.rank));
        }
        if self.fill_nan && !self.ty.is_float() {
            return invalid("integers are not filled with NaN".to_owned());
        }
        check_width(u64::from(self.boxes[0]) * self.ty.bytes(), self.swizzle)
    }

    /// Bytes that fill what lies outside the tensor, again and again.
    pub(crate) fn fill(&self) -> &'static [u8] {
        if self.fill_nan { self.ty.nan() } else { &[0] }
    }

    /// Elements of the box that are copied, dimension by dimension.
    fn counts(&self) -> [u64; RANK] {
        std::array::from_fn(|i| match i {
            0 => u64::from(self.boxes[0]),
            _ if i >= self.rank => 1,
            _ => u64::from(self.boxes[i].div_ceil(self.element_strides[i])),
        })
    }

    /// The box at some coordinates, piece by piece: its offset in the dense box, its address in the tensor (`None` outside),
    /// and its bytes. Pieces are whole rows of the box, cut at the tensor's borders.
    pub(crate) fn pieces(&self, at: &[i32], mut piece: impl FnMut(u64, Option<u64>, u64)) {
        let counts = self.counts();
        let size = self.ty.bytes();
        let rows: u64 = counts[1..].iter().product();
        let width = counts[0] * size;
        let start = i64::from(at.first().copied().unwrap_or(0));
        // Elements of a row before the tensor, in it, and behind it.
        let before = (-start).clamp(0, counts[0] as i64) as u64;
        let inside = (self.dims[0] as i64 - start.max(0)).clamp(0, counts[0] as i64 - before as i64) as u64;
        for row in 0..rows {
            let mut rest = row;
            let mut address = Some(self.address);
            for (i, count) in counts.iter().enumerate().take(self.rank).skip(1) {
                let step = rest % count * u64::from(self.element_strides[i]);
                rest /= count;
                let place = i64::from(at.get(i).copied().unwrap_or(0)) + step as i64;
                let there = (0..self.dims[i] as i64).contains(&place);
                address = address
                    .filter(|_| there)
                    .map(|a| a.wrapping_add((place as u64).wrapping_mul(self.strides[i])));
            }
            let base = row * width;
            let Some(address) = address.filter(|_| inside != 0) else {
                piece(base, None, width);
                continue;
            };
            let first = (start.max(0)) as u64;
            if before != 0 {
                piece(base, None, before * size);
            }
            piece(base + before * size, Some(address.wrapping_add(first * size)), inside * size);
            let behind = counts[0] - before - inside;
            if behind != 0 {
                piece(base + (before + inside) * size, None, behind * size);
            }
        }
    }
}

/// Whether a box may be so many bytes wide.
fn check_width(inner: u64, swizzle: Swizzle) -> Result<(), TensorMapError> {
    let span = swizzle.span();
    if !inner.is_multiple_of(16) {
        return Err(TensorMapError::Invalid(format!("the box is {inner} bytes wide, no multiple of 16")));
    }
    match swizzle {
        Swizzle::None => Ok(()),
        _ if inner > span => Err(TensorMapError::Invalid(format!(
            "the box is {inner} bytes wide, more than the {span} of its swizzle"
        ))),
        _ if inner < span => Err(TensorMapError::Unsupported(format!(
            "a box {inner} bytes wide under a swizzle of {span}: how its rows lie is not documented"
        ))),
        _ => Ok(()),
    }
}

/// FNV-1a.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, b| (sum ^ u32::from(*b)).wrapping_mul(0x0100_0193))
}
