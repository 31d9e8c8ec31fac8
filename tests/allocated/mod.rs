//! What is allocated while something runs, and the plan of a run on the CPU to hold that to. For binaries of their own: it has
//! their allocator, which counts.

#[path = "../suite/prompts.rs"]
mod prompts;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use bon_engine::gemma::config::ConfigFile;
use bon_engine::plan::{Place, Plan, Purpose, Run};
use bon_engine::train::config::TrainConfig;

use prompts::prompts;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The system's allocator, which counts once it is asked to.
struct Counting;

static COUNTS: AtomicBool = AtomicBool::new(false);
/// Bytes in use, less those that were when counting began.
static USED: AtomicI64 = AtomicI64::new(0);
static PEAK: AtomicI64 = AtomicI64::new(0);

fn count(more: usize, less: usize) {
    if COUNTS.load(Ordering::Relaxed) {
        let change = more as i64 - less as i64;
        let used = USED.fetch_add(change, Ordering::Relaxed) + change;
        PEAK.fetch_max(used, Ordering::Relaxed);
    }
}

// SAFETY: all of it is the system's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's word.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's word.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: the caller's word.
        unsafe { System.realloc(ptr, layout, size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: the caller's word.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// The most bytes that `f` has in use at once, beside those in use before.
pub(crate) fn peak(f: impl FnOnce()) -> u64 {
    USED.store(0, Ordering::Relaxed);
    PEAK.store(0, Ordering::Relaxed);
    COUNTS.store(true, Ordering::Relaxed);
    f();
    COUNTS.store(false, Ordering::Relaxed);
    PEAK.load(Ordering::Relaxed) as u64
}

/// The plan of a run with memory for all of it, and its prompts.
pub(crate) fn planned(config: &TrainConfig, purpose: Purpose) -> (Plan, Vec<Vec<u32>>) {
    let file = ConfigFile::open(&config.model.path).unwrap();
    let dtype = config.model.precision().storage(&config.model.path, &file);
    let (prompts, model) = (prompts(config, &file), &file.gemma);
    let run = Run { model, dtype, config, prompts: &prompts, purpose, reward_models: &[] };
    (Plan::new(&run, Place::Cpu(1 << 36)), prompts)
}

/// Whether that is enough and not too much: a plan is rather above than below.
pub(crate) fn is_as_planned(taken: u64, plan: &Plan) -> bool {
    (0.95..=1.01).contains(&(taken as f64 / plan.peak() as f64))
}
