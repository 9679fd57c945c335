//! Data types, and read-only tensors that borrow their bytes from a mapped file.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Kind, Result, ensure};

/// How an element is stored.
///
/// ```
/// use mindskip::tensor::DType;
///
/// let dtype: DType = "bf16".parse()?;
/// assert_eq!((dtype, dtype.size(), dtype.name()), (DType::BF16, 2, "BF16"));
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 4 bytes.
    F32,
    /// IEEE's 16 bits.
    F16,
    /// The upper 16 bits of an f32.
    BF16,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The name a safetensors header uses.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        })
    }
}

impl FromStr for DType {
    type Err = Error;
    /// Errors: Argument.
    fn from_str(text: &str) -> Result<Self> {
        let all = [DType::F32, DType::F16, DType::BF16];
        all.into_iter()
            .find(|dtype| dtype.to_string() == text)
            .ok_or_else(|| Error::new(Kind::Argument, format!("no such type: {text}")).action("give f32, f16 or bf16"))
    }
}

/// A range of bytes kept alive by its owner: a mapped file, an embedded asset, a vector. Cloning shares.
///
/// ```
/// use mindskip::tensor::Bytes;
///
/// let whole = Bytes::new(vec![1, 2, 3, 4]);
/// let part = whole.slice(1..3);
/// drop(whole);
/// assert_eq!(part[..], [2, 3]);
/// ```
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Bytes {
    /// All bytes of an owner.
    pub fn new(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        let len = owner.as_ref().len();
        Bytes { owner: Arc::new(owner), range: 0..len }
    }

    /// A part of these bytes. Panics when out of range, as slicing does.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.range.len());
        let start = self.range.start;
        Bytes { owner: self.owner.clone(), range: start + range.start..start + range.end }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", self.range.len())
    }
}

/// A dense, row-major, read-only tensor of one or two dimensions, in its stored dtype.
///
/// ```
/// use mindskip::tensor::{Bytes, DType, Data, Tensor};
///
/// let tensor = Tensor::new(DType::BF16, 1, 2, Bytes::new(vec![0x80, 0x3f, 0x00, 0xc0]))?;
/// assert!(matches!(tensor.data(), Data::BF16(elements) if elements.len() == tensor.len()));
/// assert_eq!(tensor.to_f32(), [1.0, -2.0]);
/// assert_eq!((tensor.bytes().len(), tensor.is_empty()), (4, false));
/// assert_eq!(Tensor::from_f32(&[0.5, 4.0]).to_f32(), [0.5, 4.0]);
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Tensor {
    pub dtype: DType,
    /// `[rows, cols]`; a vector is one row.
    pub rows: usize,
    pub cols: usize,
    bytes: Bytes,
}

impl Tensor {
    /// `[rows, cols]` over little-endian bytes. Those that are not aligned to the element are copied; writers of safetensors align
    /// them. Errors: Shape when they are not rows·cols elements.
    pub fn new(dtype: DType, rows: usize, cols: usize, bytes: Bytes) -> Result<Self> {
        let wanted = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
        ensure!(wanted == Some(bytes.len()), Shape, "{} bytes are not a [{rows}, {cols}] {dtype} tensor", bytes.len());
        let bytes = if (bytes.as_ptr() as usize).is_multiple_of(dtype.size()) { bytes } else { aligned_copy(&bytes) };
        Ok(Tensor { dtype, rows, cols, bytes })
    }

    /// A tensor of one row that owns its values.
    pub fn from_f32(values: &[f32]) -> Self {
        Tensor { dtype: DType::F32, rows: 1, cols: values.len(), bytes: aligned_copy(bytemuck::cast_slice(values)) }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as they are stored.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The elements, in place.
    pub fn data(&self) -> Data<'_> {
        match self.dtype {
            DType::F32 => Data::F32(bytemuck::cast_slice(&self.bytes)),
            DType::F16 => Data::F16(bytemuck::cast_slice(&self.bytes)),
            DType::BF16 => Data::BF16(bytemuck::cast_slice(&self.bytes)),
        }
    }

    /// All elements, widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.data() {
            Data::F32(v) => v.to_vec(),
            Data::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Data::BF16(v) => v.iter().map(|x| x.to_f32()).collect(),
        }
    }
}

/// A tensor's elements by dtype.
#[derive(Clone, Copy)]
pub enum Data<'a> {
    /// Of [`DType::F32`].
    F32(&'a [f32]),
    /// Of [`DType::F16`].
    F16(&'a [half::f16]),
    /// Of [`DType::BF16`].
    BF16(&'a [half::bf16]),
}

impl Data<'_> {
    /// Elements.
    pub(crate) fn len(&self) -> usize {
        match self {
            Data::F32(v) => v.len(),
            Data::F16(v) => v.len(),
            Data::BF16(v) => v.len(),
        }
    }
}

/// Copies into memory aligned for every dtype.
fn aligned_copy(bytes: &[u8]) -> Bytes {
    struct Aligned(Vec<u32>, usize);
    impl AsRef<[u8]> for Aligned {
        fn as_ref(&self) -> &[u8] {
            &bytemuck::cast_slice(&self.0)[..self.1]
        }
    }
    let mut words = vec![0u32; bytes.len().div_ceil(4)];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
    Bytes::new(Aligned(words, bytes.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misaligned_bytes_are_readable() {
        let mut raw = vec![0u8];
        raw.extend_from_slice(bytemuck::cast_slice(&[1.5f32, -2.0]));
        let t = Tensor::new(DType::F32, 1, 2, Bytes::new(raw).slice(1..9)).unwrap();
        assert_eq!(t.to_f32(), [1.5, -2.0]);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        assert!(Tensor::new(DType::BF16, 3, 3, Bytes::new(vec![0u8; 16])).is_err());
        assert!(Tensor::new(DType::F32, usize::MAX, 2, Bytes::new(Vec::new())).is_err());
    }
}
