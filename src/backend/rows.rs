//! Moving, scaling, adding and widening rows.

use super::platform::{DType, Platform};

/// What moves or scales rows.
pub trait Rows: Platform {
    /// factor x.
    fn scaled(&self, x: Self::Tensor, factor: f32) -> Self::Tensor;
    /// sum += x; sum is f32.
    fn accumulate(&self, x: &Self::Tensor, sum: &mut Self::Tensor);
    /// A sum in f32 as an activation.
    fn narrowed(&self, sum: &Self::Tensor) -> Self::Tensor;
    /// x in f32, which holds every bf16 exactly.
    fn widened(&self, x: &Self::Tensor) -> Self::Tensor {
        let (rows, cols) = self.shape(x);
        self.upload(DType::F32, rows, cols, bytemuck::cast_slice(&self.to_f32(x)))
    }
    /// out\[i\] = x\[rows\[i\]\].
    fn gather_rows(&self, x: &Self::Tensor, rows: &[u32]) -> Self::Tensor;
    /// The transpose of [`Rows::gather_rows`] out of `total` rows: dx\[rows\[i\]\] = dy\[i\], zero elsewhere; `rows`
    /// ascend without repeating.
    fn scatter_rows(&self, dy: &Self::Tensor, rows: &[u32], total: usize) -> Self::Tensor;
}
