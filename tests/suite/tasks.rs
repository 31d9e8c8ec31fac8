//! Files of tasks, and the order in which epochs ask for them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use bon_engine::tasks::{Order, Tasks};
use proptest::prelude::*;

fn tasks(bytes: &[u8]) -> Result<Tasks, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.jsonl");
    fs::write(&path, bytes).unwrap();
    Tasks::read(&path).map_err(|e| e.to_string().replace(&format!("{}/", dir.path().display()), ""))
}

#[test]
fn tasks_are_read_with_their_further_fields() {
    let text = "\u{feff}{\"prompt\": \"2+2=\", \"answer\": 4, \"level\": [1]}\r\n\n \
                {\"answer\":\"-0.50\",\"prompt\":\"ü\",\"response\":\"It is -0.50\"}\n\
                {\"prompt\":\"p\",\"answer\":2.5}\n{\"prompt\":\"p\",\"answer\":18446744073709551615}";
    let found = tasks(text.as_bytes()).unwrap();
    let rows: Vec<_> =
        found.list.iter().map(|t| (t.prompt.as_str(), t.answer.as_str(), t.response())).collect();
    assert_eq!(
        rows,
        [
            ("2+2=", "4", "4"),
            ("ü", "-0.50", "It is -0.50"),
            ("p", "2.5", "2.5"),
            ("p", "18446744073709551615", "18446744073709551615"),
        ]
    );
    assert_eq!(found.list[0].fields["level"], serde_json::json!([1]));
    assert_ne!(found.fingerprint, tasks(text.replace("[1]", "[2]").as_bytes()).unwrap().fingerprint);
}

#[test]
fn a_line_that_is_no_task_is_named() {
    let good = "{\"prompt\":\"p\",\"answer\":\"a\"}\n";
    for (line, message) in [
        ("[1]", "t.jsonl:3: an array, where an object with `prompt` and `answer` must stand"),
        ("\"prompt\"", "t.jsonl:3: a string, where an object with `prompt` and `answer` must stand"),
        ("{\"answer\":\"a\"}", "t.jsonl:3: field `prompt` is missing"),
        ("{\"prompt\":\"p\"}", "t.jsonl:3: field `answer` is missing"),
        ("{\"prompt\":7,\"answer\":\"a\"}", "t.jsonl:3: field `prompt` is a number; it must be a string"),
        (
            "{\"prompt\":\"p\",\"answer\":null}",
            "t.jsonl:3: field `answer` is null; it must be a string or a number",
        ),
        ("{\"prompt\":\" \\n\",\"answer\":\"a\"}", "t.jsonl:3: field `prompt` is blank"),
        ("{\"prompt\":\"p\",\"answer\":\"\"}", "t.jsonl:3: field `answer` is blank"),
        ("{\"prompt\":\"p\",\"answer\":\"a\",\"response\":\"\"}", "t.jsonl:3: field `response` is blank"),
        (
            "{\"prompt\":\"p\",\"answer\":\"a\",\"response\":{}}",
            "t.jsonl:3: field `response` is an object; it must be a string",
        ),
        (
            "{\"prompt\":\"p\",\"answer\":100000000000000000000}",
            "t.jsonl:3: field `answer`: 100000000000000000000 is too large to be read exactly; write it as a string",
        ),
    ] {
        assert_eq!(tasks(format!("{good}\n{line}\n{good}").as_bytes()).unwrap_err(), message);
    }
    let cut = tasks(format!("{good}{{\"prompt\":\"p\",").as_bytes()).unwrap_err();
    assert!(cut.starts_with("t.jsonl:2: not JSON: EOF while parsing"), "{cut}");
    let latin1 = tasks(b"{\"prompt\":\"\xfc\",\"answer\":\"a\"}").unwrap_err();
    assert_eq!(latin1, "t.jsonl:1: not UTF-8 at byte 12 of the line; save the file as UTF-8");
    for empty in ["", "\n \n", "\u{feff}"] {
        assert!(tasks(empty.as_bytes()).unwrap_err().starts_with("t.jsonl: no tasks; "));
    }
    let missing = Tasks::read(Path::new("nowhere.jsonl")).unwrap_err();
    assert_eq!(missing.to_string(), "cannot read the tasks in nowhere.jsonl");
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        let _ = tasks(&bytes);
        let _ = tasks(&[b"{\"prompt\":\"p\",\"answer\":", &bytes[..], b"}"].concat());
    }
}

#[test]
fn every_epoch_is_another_permutation_and_any_position_can_be_asked_for() {
    let (n, seed) = (10usize, 3);
    let mut order = Order::new(n, seed);
    let drawn: Vec<usize> = (0..40).map(|p| order.task(p)).collect();
    for epoch in drawn.chunks(n) {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..n).collect::<Vec<_>>());
    }
    assert_ne!(drawn[..n], drawn[n..2 * n]);
    // A resumed run begins in the middle; so does one that goes back.
    for p in (0..40).rev() {
        assert_eq!(order.task(p), drawn[p as usize]);
        assert_eq!(Order::new(n, seed).task(p), drawn[p as usize]);
    }
    let mut other = Order::new(n, seed + 1);
    assert_ne!((0..40).map(|p| other.task(p)).collect::<Vec<_>>(), drawn);
    // What takes the place of others comes in another order, which is one of permutations, too.
    let mut refills = Order::refills(10, 3);
    let further: Vec<usize> = (0..40).map(|p| refills.task(p)).collect();
    assert_ne!(further, drawn);
    for epoch in further.chunks(10) {
        assert_eq!(epoch.iter().copied().collect::<BTreeSet<_>>(), (0..10).collect::<BTreeSet<_>>());
    }
    assert!((0..5).all(|p| Order::new(1, 0).task(p) == 0));
}
