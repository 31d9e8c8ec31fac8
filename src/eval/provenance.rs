//! What made a report, and whether another one can be compared with it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What made a report.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The program's version, the device, the model and its hash, and every setting that the figures depend on, by
    /// their keys, such as `generate.temperature`.
    pub settings: BTreeMap<String, String>,
    /// The answers of the problems, in their order.
    pub answers: Vec<String>,
    /// The command line, where it was one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command: String,
}

/// One thing in which two reports were made differently.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// The setting.
    pub what: String,
    /// Its value in the first report.
    pub before: String,
    /// In the second.
    pub after: String,
    /// Whether it changes what "right" means, so that the figures measure different things.
    pub of_measure: bool,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} -> {}", self.what, cut(&self.before), cut(&self.after))
    }
}

/// The start of a long value, in one line.
fn cut(value: &str) -> String {
    const MAX_CHARS: usize = 120;
    let value = value.replace('\n', "\\n");
    match value.char_indices().nth(MAX_CHARS) {
        None => value,
        Some((end, _)) => format!("{}...", &value[..end]),
    }
}

impl Provenance {
    /// All that differs from this to `after`; what changes the measure comes first. Settings that one of the two does
    /// not have are "unset".
    pub fn differences(&self, after: &Self) -> Vec<Difference> {
        let mut found = Vec::new();
        let unequal = |(_, (before, after)): &(usize, (&String, &String))| before != after;
        let changed: Vec<_> = self.answers.iter().zip(&after.answers).enumerate().filter(unequal).collect();
        if let Some((i, (old, new))) = changed.first() {
            let what = match changed.len() {
                1 => format!("the answer of problem {}", i + 1),
                count => format!("the answers of {count} problems, the first of problem {}", i + 1),
            };
            found.push(Difference {
                what,
                before: format!("{old:?}"),
                after: format!("{new:?}"),
                of_measure: true,
            });
        }
        let (old, new) = (&self.settings, &after.settings);
        let programs = [old, new].iter().any(|settings| {
            JUDGES.iter().any(|judge| {
                settings
                    .get(&format!("{judge}.kind"))
                    .is_some_and(|kind| kind.contains("command") || kind.contains("program"))
            })
        });
        let mut keys: Vec<&String> =
            old.keys().chain(new.keys().filter(|key| !old.contains_key(*key))).collect();
        keys.sort();
        for key in keys.into_iter().filter(|key| old.get(*key) != new.get(*key)) {
            let value = |settings: &BTreeMap<String, String>| {
                settings.get(key).map_or("unset".to_owned(), Clone::clone)
            };
            found.push(Difference {
                what: key.clone(),
                before: value(old),
                after: value(new),
                of_measure: of_measure(key, programs),
            });
        }
        found.sort_by_key(|difference| !difference.of_measure);
        found
    }
}

/// The setting that evaluations are run at several values of.
pub const TEMPERATURE: &str = "generate.temperature";
/// The sections of the settings that say how responses are judged.
const JUDGES: [&str; 2] = ["verifier", "environment"];
/// Everything of the tasks' lines but prompts and answers, which `programs` alone read.
pub const OTHER_FIELDS: &str = "data.other_fields";

/// Whether another value of the setting is another definition of "right".
fn of_measure(key: &str, programs: bool) -> bool {
    let (section, field) = key.split_once('.').unwrap_or((key, ""));
    let of_machine = ["timeout_seconds", "workers", "isolation"].contains(&field);
    (JUDGES.contains(&section) && !of_machine)
        || key == "objective.pass_threshold"
        || (programs && key == OTHER_FIELDS)
}
