//! Launchers of kernels/embed.cu.

use super::entries::Entry;
use super::tables::Tokens;
use super::{Cuda, Tables, Tensor, VECTOR};
use crate::backend::{DType, Embed};
use crate::device::{Arg, Launch, Ptr};

/// Threads of a block for rows of `accesses` accesses.
fn threads(accesses: usize) -> u32 {
    accesses.next_multiple_of(32).clamp(32, 256) as u32
}

impl Embed for Cuda {
    /// Columns a multiple of 8.
    fn embed_forward(&self, embedding: &Tensor, tables: &Tables, scale: f32) -> Tensor {
        assert!(
            embedding.dtype == DType::Bf16 && embedding.cols.is_multiple_of(VECTOR),
            "bf16 rows of a multiple of {VECTOR} columns"
        );
        let x = self.empty(DType::Bf16, tables.rows, embedding.cols);
        let launch = Launch::linear(x.rows, threads(x.cols / VECTOR));
        match &tables.tokens {
            Tokens::Known(ids, on_device) => {
                assert!(ids.iter().all(|&id| (id as usize) < embedding.rows), "ids of the vocabulary");
                let args = [embedding.arg(), on_device.arg(), x.arg(), x.cols.into(), scale.into()];
                self.launch(Entry::EmbedForward, launch, &args);
            }
            Tokens::Drawn(draws, from) => {
                let args =
                    [embedding.arg(), draws.arg(), from.arg(), x.arg(), x.cols.into(), embedding.rows.into()];
                self.launch(Entry::EmbedForwardDrawn, launch, &[&args[..], &[scale.into()]].concat());
            }
        }
        x
    }

    /// Columns a multiple of 8.
    fn embed_backward(&self, dx: &Tensor, tables: &Tables, scale: f32, d_embedding: &mut Tensor) {
        if d_embedding.rows == 0 {
            return;
        }
        assert!(
            dx.dtype == DType::Bf16 && dx.cols.is_multiple_of(VECTOR) && dx.rows == tables.rows,
            "bf16 rows of a multiple of {VECTOR} columns, one for every token"
        );
        assert!(d_embedding.cols == dx.cols, "a gradient of rows like dx");
        let Tokens::Known(ids, _) = &tables.tokens else {
            panic!("the gradient is of tokens that the host knows")
        };
        assert!(ids.iter().all(|&id| (id as usize) < d_embedding.rows), "ids of the vocabulary");
        let (work, count) = runs(ids);
        let work = self.array(&work);
        let order = Arg::Ptr(Ptr(work.ptr().0 + 12 * count as u64));
        let launch = Launch::linear(count, threads(dx.cols / 4));
        let args = [dx.arg(), work.arg(), order, d_embedding.arg(), dx.cols.into(), scale.into()];
        let entry = match d_embedding.dtype {
            DType::F32 => Entry::EmbedBackward,
            DType::Bf16 => Entry::EmbedBackwardBf16,
        };
        self.launch(entry, launch, &args);
    }
}

/// The work of the blocks: {id, begin, end} for each different id, then the order of the tokens by id, in which tokens
/// `begin..end` have that id. Also the number of different ids.
fn runs(ids: &[u32]) -> (Vec<u32>, usize) {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&t| ids[t as usize]); // stable: an id's tokens stay in order
    let mut work = Vec::new();
    let mut begin = 0;
    for tokens in order.chunk_by(|&a, &b| ids[a as usize] == ids[b as usize]) {
        let end = begin + tokens.len();
        work.extend([ids[tokens[0] as usize], begin as u32, end as u32]);
        begin = end;
    }
    let count = work.len() / 3;
    work.extend(order);
    (work, count)
}
