//! The pool, which judges in the background.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bon_engine::verifier::pool::{Job, Pool, Verdicts};
use bon_engine::verifier::{Failure, Request, Verifier};
use serde_json::{Value, json};

use super::command::{AMPLE, Script};

fn job(id: usize, response: &str) -> Job {
    let Value::Object(task) = json!({"id": id}) else { unreachable!() };
    Job { id, prompt: "?".into(), response: response.to_owned(), answer: "1".into(), task: Arc::new(task) }
}

#[test]
fn a_pool_judges_in_parallel_and_in_order() {
    // The score is the task's id; lower ids take longer.
    let script = Script::new(
        r#"while read -r line; do n=${line##*\"id\":}; n=${n%%\}*}; sleep "0.$((9 - n))"; reply "$n"; done"#,
        AMPLE,
        8,
    );
    let mut pool = Pool::new(script.verifier.clone());
    for round in 0..2 {
        let begun = Instant::now();
        (0..8).for_each(|id| pool.submit(job(id, "fine")));
        assert!(begun.elapsed() < Duration::from_millis(500), "submitting does not wait");
        let wanted = (0..8).map(|id| (id, Ok(id as f64))).collect();
        assert_eq!(pool.collect(), Ok(Verdicts { scores: wanted }), "round {round}");
        // One after the other they take 4.4 s.
        assert!(begun.elapsed() < Duration::from_secs(4), "round {round} took {:?}", begun.elapsed());
    }
    assert_eq!(pool.collect(), Ok(Verdicts { scores: Vec::new() }), "nothing is left");
    drop(pool);
    script.finish();
}

#[test]
fn a_pool_names_failures_by_kind() {
    let script = Script::new(
        r#"while read -r line; do case "$line" in *bomb*) exit 1;; *null*) reply null;; *) reply 1;; esac; done"#,
        AMPLE,
        2,
    );
    assert_eq!(script.score("fine"), Ok(1.0));
    let mut pool = Pool::new(script.verifier.clone());
    for (id, response) in ["bomb", "fine", "null", "bomb", "fine", "bomb"].iter().enumerate() {
        pool.submit(job(id, response));
    }
    let verdicts = pool.collect().unwrap();
    let failed = |(_, score): &(usize, Result<f64, Failure>)| score.as_ref().err().map(Failure::kind);
    let kinds: Vec<_> = verdicts.scores.iter().filter_map(failed).collect();
    assert_eq!(kinds, ["crashed", "missing", "crashed", "crashed"]);
    let fine: Vec<_> = verdicts.scores.iter().filter(|(_, score)| score.is_ok()).map(|(id, _)| *id).collect();
    assert_eq!(fine, [1, 4]);
    drop(pool);
    script.finish();
}

#[test]
fn a_pool_reports_a_program_that_does_not_work() {
    let script = Script::new("echo no module named sympy >&2; exit 1", AMPLE, 2);
    let mut pool = Pool::new(script.verifier.clone());
    (0..20).for_each(|id| pool.submit(job(id, "fine")));
    let failure = pool.collect().unwrap_err();
    assert!(
        failure.kind() == "unavailable" && failure.to_string().contains("no module named sympy"),
        "{failure}"
    );
    drop(pool);
    script.finish();
}

#[test]
fn dropping_a_pool_gives_up_what_nobody_began() {
    let script = Script::new("while read -r line; do sleep 0.3; reply 1; done", AMPLE, 1);
    let mut pool = Pool::new(script.verifier.clone());
    (0..100).for_each(|id| pool.submit(job(id, "fine")));
    let begun = Instant::now();
    drop(pool);
    assert!(begun.elapsed() < Duration::from_secs(5), "dropping took {:?}", begun.elapsed());
    script.finish();
}

#[test]
#[should_panic(expected = "a bug in a verifier")]
fn a_panic_in_a_verifier_reaches_the_caller() {
    struct Buggy;
    impl Verifier for Buggy {
        fn score(&self, _request: &Request) -> Result<f64, Failure> {
            panic!("a bug in a verifier");
        }
        fn extract(&self, _response: &str) -> Option<String> {
            None
        }
    }
    let mut pool = Pool::new(Arc::new(Buggy));
    pool.submit(job(0, "fine"));
    pool.submit(job(1, "fine"));
    let _ = pool.collect();
}
