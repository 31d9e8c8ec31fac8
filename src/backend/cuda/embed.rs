//! Launchers of kernels/embed.cu.

use std::cell::RefCell;

use super::entries::Entry;
use super::tables::Tokens;
use super::workload::{Shape, Workload, random};
use super::{Cuda, Tables, Tensor, VECTOR};
use crate::backend::{Batch, DType};
use crate::device::{Arg, Launch, Ptr};
use crate::segments::Segments;

/// Threads of a block for rows of `accesses` accesses.
fn threads(accesses: usize) -> u32 {
    accesses.next_multiple_of(32).clamp(32, 256) as u32
}

/// See [`crate::backend::Backend::embed_forward`]; columns a multiple of 8.
pub(super) fn forward(cuda: &Cuda, embedding: &Tensor, tables: &Tables, scale: f32) -> Tensor {
    assert!(
        embedding.dtype == DType::Bf16 && embedding.cols.is_multiple_of(VECTOR),
        "bf16 rows of a multiple of {VECTOR} columns"
    );
    let x = cuda.empty(DType::Bf16, tables.rows, embedding.cols);
    let launch = Launch::linear(x.rows, threads(x.cols / VECTOR));
    match &tables.tokens {
        Tokens::Known(ids, on_device) => {
            assert!(ids.iter().all(|&id| (id as usize) < embedding.rows), "ids of the vocabulary");
            let args = [embedding.arg(), on_device.arg(), x.arg(), x.cols.into(), scale.into()];
            cuda.launch(Entry::EmbedForward, launch, &args);
        }
        Tokens::Drawn(draws, from) => {
            let args =
                [embedding.arg(), draws.arg(), from.arg(), x.arg(), x.cols.into(), embedding.rows.into()];
            cuda.launch(Entry::EmbedForwardDrawn, launch, &[&args[..], &[scale.into()]].concat());
        }
    }
    x
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

/// See [`crate::backend::Backend::embed_backward`]; columns a multiple of 8.
pub(super) fn backward(cuda: &Cuda, dx: &Tensor, tables: &Tables, scale: f32, d_embedding: &mut Tensor) {
    assert!(
        dx.dtype == DType::Bf16 && dx.cols.is_multiple_of(VECTOR) && dx.rows == tables.rows,
        "bf16 rows of a multiple of {VECTOR} columns, one for every token"
    );
    assert!(
        d_embedding.dtype == DType::F32 && d_embedding.cols == dx.cols,
        "an f32 gradient of rows like dx"
    );
    let Tokens::Known(ids, _) = &tables.tokens else {
        panic!("the gradient is of tokens that the host knows")
    };
    assert!(ids.iter().all(|&id| (id as usize) < d_embedding.rows), "ids of the vocabulary");
    let (work, count) = runs(ids);
    let work = cuda.array(&work);
    let order = Arg::Ptr(Ptr(work.ptr().0 + 12 * count as u64));
    let launch = Launch::linear(count, threads(dx.cols / 4));
    let args = [dx.arg(), work.arg(), order, d_embedding.arg(), dx.cols.into(), scale.into()];
    cuda.launch(Entry::EmbedBackward, launch, &args);
}

/// A training batch; most of a vocabulary does not occur in it, so a small embedding serves.
pub(super) fn workloads(shape: &Shape) -> Vec<Workload> {
    const T: usize = 2048;
    const VOCAB: u32 = 4096;
    const SCALE: f32 = 25.25;
    let d = shape.hidden;
    // A few hundred ids, the frequent ones some ten times.
    let ids: Vec<u32> = (0..T as u32).map(|t| (t * t % 1021 * 31 + t % 7) % VOCAB).collect();
    let distinct = runs(&ids).1;
    let tables = move |cuda: &Cuda| {
        let segments = Segments::separate(&[T]);
        let (positions, runs) = (segments.positions(), segments.all_queries());
        Tables::new(cuda, &Batch { ids: &ids, positions: &positions, segments: &segments, runs: &runs }, &[])
    };
    let tables_backward = tables.clone();
    vec![
        Workload {
            name: format!("embed_forward T = {T}"),
            bytes: ((distinct + T) * d * 2 + T * 4) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let (tables, embedding) = (tables(cuda), random(cuda, 1, DType::Bf16, VOCAB as usize, d));
                Box::new(move |cuda| drop(forward(cuda, &embedding, &tables, SCALE)))
            }),
        },
        Workload {
            name: format!("embed_backward T = {T}"),
            bytes: (distinct * (d * 8 + 12) + T * (d * 2 + 4)) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let (tables, dx) = (tables_backward(cuda), random(cuda, 1, DType::Bf16, T, d));
                let d_embedding = RefCell::new(random(cuda, 2, DType::F32, VOCAB as usize, d));
                Box::new(move |cuda| backward(cuda, &dx, &tables, SCALE, &mut d_embedding.borrow_mut()))
            }),
        },
    ]
}
