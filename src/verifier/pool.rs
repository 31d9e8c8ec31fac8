//! Verification beside generation: responses are judged while others are still being sampled.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use serde_json::{Map, Value};

use super::{Failure, Request, Verifier};

/// A [`Request`] that owns its text.
#[derive(Debug, Clone)]
pub struct Job {
    /// The caller's number for it; [`Verdicts`] are in its order.
    pub id: usize,
    /// [`Request::prompt`].
    pub prompt: Arc<str>,
    /// [`Request::response`].
    pub response: String,
    /// [`Request::answer`].
    pub answer: Arc<str>,
    /// [`Request::task`].
    pub task: Arc<Map<String, Value>>,
}

/// The outcome of the jobs between two calls of [`Pool::collect`].
#[derive(Debug, Clone, PartialEq)]
pub struct Verdicts {
    /// Job id and score, by ascending id, whatever the order in which the verdicts came.
    pub scores: Vec<(usize, Result<f64, Failure>)>,
}

/// Responses without a single verdict that prove that none will come: fewer could be bad luck where few can be judged.
const SILENT: usize = 64;

/// A job's id and outcome, or what the verifier panicked with.
type Outcome = Result<(usize, Result<f64, Failure>), Box<dyn Any + Send>>;

/// Threads that judge what is submitted, as many as the verifier has use for.
pub struct Pool {
    jobs: Option<Sender<Job>>,
    outcomes: Receiver<Outcome>,
    submitted: usize,
    verifier: Arc<dyn Verifier>,
    /// Until the first verdict: how many responses could not be judged, and why the first could not.
    silence: Option<(usize, Option<Failure>)>,
    closing: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts [`Verifier::parallelism`] threads, which wait for work.
    pub fn new(verifier: Arc<dyn Verifier>) -> Self {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let (report, outcomes) = channel();
        let closing = Arc::new(AtomicBool::new(false));
        let threads = (0..verifier.parallelism())
            .map(|_| {
                let (verifier, queue) = (Arc::clone(&verifier), Arc::clone(&queue));
                let (report, closing) = (report.clone(), Arc::clone(&closing));
                std::thread::spawn(move || {
                    loop {
                        // The lock is held while waiting: the next job goes to whoever has it.
                        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        let Ok(job) = job else { return };
                        if closing.load(Ordering::Relaxed) {
                            return;
                        }
                        let outcome = catch_unwind(AssertUnwindSafe(|| judge(&*verifier, &job)));
                        if report.send(outcome.map(|score| (job.id, score))).is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        Self {
            jobs: Some(jobs),
            outcomes,
            submitted: 0,
            verifier,
            silence: Some((0, None)),
            closing,
            threads,
        }
    }

    /// Hands over a job and returns at once.
    pub fn submit(&mut self, job: Job) {
        let jobs = self.jobs.as_ref().expect("only drop takes the sender");
        jobs.send(job).expect("threads end only when the pool is dropped");
        self.submitted += 1;
    }

    /// Waits for everything submitted since the last call. The pool can then be used again.
    ///
    /// Fails, as [`Failure::Unavailable`] or [`Failure::Silent`], if the verifier does not work at all: such scores mean
    /// nothing, and more of them would not come. A panic of the verifier goes on in the caller.
    pub fn collect(&mut self) -> Result<Verdicts, Failure> {
        let mut scores = Vec::with_capacity(self.submitted);
        let mut panicked = None;
        for _ in 0..std::mem::take(&mut self.submitted) {
            match self.outcomes.recv().expect("every job is reported") {
                Ok(score) => scores.push(score),
                Err(payload) => panicked = Some(payload),
            }
        }
        if let Some(payload) = panicked {
            resume_unwind(payload);
        }
        let hopeless = |(_, score): &(_, Result<f64, Failure>)| match score {
            Err(failure @ Failure::Unavailable { .. }) => Some(failure.clone()),
            _ => None,
        };
        if let Some(failure) = scores.iter().find_map(hopeless) {
            return Err(failure);
        }
        scores.sort_by_key(|&(id, _)| id);
        if scores.iter().any(|(_, score)| score.is_ok()) {
            self.silence = None;
        } else if let Some((count, first)) = &mut self.silence {
            *count += scores.len();
            *first = first.take().or_else(|| scores.iter().find_map(|(_, score)| score.clone().err()));
            if *count >= SILENT
                && let Some(failure) = self.silent()
            {
                return Err(failure);
            }
        }
        Ok(Verdicts { scores })
    }

    /// [`Failure::Silent`], if there were responses to judge and no verdict has ever come.
    pub fn silent(&self) -> Option<Failure> {
        let (times, first) = self.silence.as_ref()?;
        Some(Failure::Silent { times: *times, first: Box::new(first.clone()?) })
    }

    /// [`Verifier::check_task`] of what judges here.
    pub fn check_task(&self, task: &Map<String, Value>) -> Result<(), String> {
        self.verifier.check_task(task)
    }

    /// [`Verifier::notes`] of what judges here.
    pub fn notes(&self) -> Vec<String> {
        self.verifier.notes()
    }
}

impl Drop for Pool {
    /// Gives up the jobs that nobody has begun and waits for the others, which end within the verifier's timeout:
    /// a thread that outlived the pool would keep the verifier's program alive.
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // Panics were caught and reported; there is nothing more to say.
            let _ = thread.join();
        }
    }
}

fn judge(verifier: &dyn Verifier, job: &Job) -> Result<f64, Failure> {
    verifier.score(&Request {
        prompt: &job.prompt,
        response: &job.response,
        answer: &job.answer,
        task: &job.task,
    })
}
