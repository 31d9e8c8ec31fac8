//! Tasks shared among rayon's threads, one after the other.
//!
//! Rayon cuts a parallel iterator into halves as long as threads ask for work, which leaves pieces of several tasks: too
//! coarse for a product of a dozen of them. A task's result depends on its number alone, so who computes it does not matter.
//!
//! Rayon's threads sleep soon after they run out of work. To wake one took 100 us on a virtual machine, as long as an op of a
//! decoding step takes, so that nearly all of a step was computed by one thread. Here threads stay awake for
//! [`AWAKE`] after an op began, where the program wants it ([`stay_awake`]).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use super::room;

/// Nanoseconds that threads look for work before they sleep: the host's part of a decoding step is shorter.
const AWAKE: u64 = 500_000;

/// Whether threads stay awake.
static WANTED: AtomicBool = AtomicBool::new(false);
/// Threads that stay awake now, or are about to.
static STAYING: AtomicUsize = AtomicUsize::new(0);
/// When the last op began, in nanoseconds of [`clock`].
static LATEST: AtomicU64 = AtomicU64::new(0);

/// Lets the threads of the global pool stay awake between ops from now on. The calling thread is one of them.
pub(super) fn stay_awake() {
    WANTED.store(true, Ordering::Relaxed);
}

/// Nanoseconds since the first call.
fn clock() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// A raw pointer that tasks write through; each task owns its own elements.
#[derive(Clone, Copy)]
pub(super) struct Out(*mut f32);
// SAFETY: tasks that share an `Out` write disjoint elements; each use says which.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    pub(super) fn new(x: &mut [f32]) -> Self {
        Self(x.as_mut_ptr())
    }

    /// To the room that a vector has beyond its length.
    pub(super) fn of_room(x: &mut Vec<f32>) -> Self {
        Self(x.spare_capacity_mut().as_mut_ptr().cast())
    }

    /// Writes `len` elements from `i` on.
    ///
    /// # Safety
    /// There is room for them, and nobody else uses it.
    pub(super) unsafe fn fill(self, i: usize, len: usize, value: f32) {
        for i in i..i + len {
            // SAFETY: the caller's word.
            unsafe { self.at(i).write(value) };
        }
    }

    /// Writes elements from `i` on.
    ///
    /// # Safety
    /// There is room for them, and nobody else uses it.
    pub(super) unsafe fn write(self, i: usize, x: &[f32]) {
        // SAFETY: the caller's word.
        unsafe { self.at(i).copy_from_nonoverlapping(x.as_ptr(), x.len()) };
    }

    fn at(self, i: usize) -> *mut f32 {
        // Method, not field access: closures then capture the wrapper, which is Sync.
        self.0.wrapping_add(i)
    }

    /// Elements `i..i + len`.
    ///
    /// # Safety
    /// They are there, and nobody else uses them.
    pub(super) unsafe fn slice<'a>(self, i: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.at(i), len) }
    }
}

/// Consecutive tasks that nobody has begun: the first one in the upper half of the word, the end in the lower half.
struct Tasks(AtomicU64);

impl Tasks {
    fn new(tasks: Range<usize>) -> Self {
        Self(AtomicU64::new((tasks.start as u64) << 32 | tasks.end as u64))
    }

    /// Takes the first, or the last.
    fn take(&self, last: bool) -> Option<usize> {
        let rest = |word: u64| {
            let (first, end) = (word >> 32, word & 0xffff_ffff);
            (first < end).then(|| if last { word - 1 } else { word + (1 << 32) })
        };
        let word = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest).ok()?;
        Some(if last { (word & 0xffff_ffff) as usize - 1 } else { (word >> 32) as usize })
    }
}

/// Calls `work(state, i)` for all i below `tasks`, where `state` is a thread's own, made by `init`. A thread takes tasks in their
/// order, because one may prefetch what the next one reads, and then others' last ones.
pub(super) fn for_each<S>(tasks: usize, init: impl Fn() -> S + Sync, work: impl Fn(&mut S, usize) + Sync) {
    let threads = rayon::current_num_threads().min(tasks);
    let of_threads: Vec<Tasks> =
        (0..threads).map(|t| Tasks::new(t * tasks / threads..(t + 1) * tasks / threads)).collect();
    let left = AtomicUsize::new(tasks);
    let run = |thread: usize| {
        let others = || (1..threads).find_map(|t| of_threads[(thread + t) % threads].take(true));
        let take = || of_threads[thread].take(false).or_else(others);
        let Some(first) = take() else { return };
        let mut state = init();
        let mut task = Some(first);
        while let Some(i) = task {
            work(&mut state, i);
            left.fetch_sub(1, Ordering::Relaxed);
            task = take();
        }
    };
    let awake = threads > 1 && wake();
    let run = |thread: usize| {
        run(thread);
        // Rayon's own wait would put the calling thread to sleep.
        if awake && thread == 0 {
            let until = clock() + AWAKE;
            while left.load(Ordering::Relaxed) > 0 && clock() < until {
                std::hint::spin_loop();
            }
        }
    };
    match threads {
        0 => {}
        _ => on_threads(0..threads, &run),
    }
}

/// What `make` makes of each i below `tasks`.
pub(super) fn mapped<T: Send>(tasks: usize, make: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let made: Vec<Mutex<Option<T>>> = (0..tasks).map(|_| Mutex::new(None)).collect();
    for_each(tasks, || (), |(), i| *made[i].lock().expect("one task has the place") = Some(make(i)));
    let of_place =
        |place: Mutex<Option<T>>| place.into_inner().expect("no task panicked").expect("all are made");
    made.into_iter().map(of_place).collect()
}

/// `len` floats in blocks of `block`, of which the last may have fewer: `f(first, floats)` fills each, which comes as zeros.
/// A block's thread is the first to write it, because memory that another core has just written is slow to write.
pub(super) fn filled(len: usize, block: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let mut x = room(len);
    let to = Out::of_room(&mut x);
    for_each(
        len.div_ceil(block.max(1)),
        || (),
        |(), i| {
            let first = i * block;
            let n = block.min(len - first);
            // SAFETY: this task alone owns the block, which has room in the vector.
            f(first, unsafe {
                to.fill(first, n, 0.0);
                to.slice(first, n)
            });
        },
    );
    // SAFETY: the tasks have filled all of it.
    unsafe { x.set_len(len) };
    x
}

/// Offers `run` to so many threads, of which the calling one is the first. Those that are asleep need not have woken up by the
/// end: what nobody has begun, this thread begins, and finds nothing to do.
fn on_threads(threads: Range<usize>, run: &(dyn Fn(usize) + Sync)) {
    if threads.len() == 1 {
        return run(threads.start);
    }
    let middle = threads.start + threads.len().div_ceil(2);
    rayon::join(|| on_threads(threads.start..middle, run), || on_threads(middle..threads.end, run));
}

/// Says that an op begins, and wakes the pool's threads if they are asleep. Whether they stay awake.
fn wake() -> bool {
    if !WANTED.load(Ordering::Relaxed) {
        return false;
    }
    LATEST.store(clock(), Ordering::Relaxed);
    let Some(here) = rayon::current_thread_index() else { return false };
    let others = rayon::current_num_threads() - 1;
    if STAYING.compare_exchange(0, others, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
        rayon::spawn_broadcast(move |thread| {
            if thread.index() != here {
                stay();
                STAYING.fetch_sub(1, Ordering::Relaxed);
            }
        });
    }
    true
}

/// Looks for work until [`AWAKE`] has passed since an op began.
fn stay() {
    while clock().saturating_sub(LATEST.load(Ordering::Relaxed)) < AWAKE {
        if rayon::yield_now() != Some(rayon::Yield::Executed) {
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once_whatever_the_threads() {
        for awake in [false, true] {
            WANTED.store(awake, Ordering::Relaxed);
            for threads in [1, 2, 3, 5] {
                let pool =
                    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
                for tasks in [0, 1, 2, 7, 100] {
                    let done = Mutex::new(Vec::new());
                    let states = AtomicUsize::new(0);
                    pool.install(|| {
                        for_each(
                            tasks,
                            || states.fetch_add(1, Ordering::Relaxed),
                            |_, i| done.lock().expect("no task panics").push(i),
                        );
                    });
                    let mut done = done.into_inner().expect("no task panics");
                    done.sort_unstable();
                    assert!(
                        done.into_iter().eq(0..tasks),
                        "{tasks} tasks on {threads} threads, awake: {awake}"
                    );
                    assert!(states.into_inner() <= threads.min(tasks));
                    let squares = pool.install(|| mapped(tasks, |i| i * i));
                    assert!(squares.into_iter().eq((0..tasks).map(|i| i * i)));
                }
            }
            WANTED.store(false, Ordering::Relaxed);
        }
    }
}
