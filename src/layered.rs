//! Settings from a TOML file with `key.path=value` overrides on top.
//!
//! Unknown keys and values of the wrong type are errors that name the file and line (or the override), the key and the
//! nearest known name.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use thiserror::Error;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Why settings cannot be read.
#[derive(Debug, Error)]
pub enum LayeredError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// TOML that does not parse, an unknown key, a value of the wrong type.
    #[error("{place}: {message}")]
    Parse {
        /// `file:line`, or the override.
        place: String,
        /// What is wrong, and what was meant.
        message: String,
    },
    /// An override that is no `key.path=value`.
    #[error("--set {0}: expected key.path=value, such as --set optimizer.lr=1e-5")]
    Override(String),
}

/// The text of a file, without a byte order mark.
pub fn read_text(path: &Path) -> Result<String, LayeredError> {
    let text = fs::read_to_string(path).map_err(|e| LayeredError::Read { path: path.into(), source: e })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// Deserialises the text of a file, which errors call `name`, with overrides applied in order. A value of an override
/// that is no TOML is taken as a string, so that paths need no quotes.
pub fn parse<T: DeserializeOwned>(name: &str, text: &str, overrides: &[String]) -> Result<T, LayeredError> {
    Sources::new(name, text, overrides)?.deserialize()
}

/// The file and the overrides, laid end to end in one space of byte offsets: a TOML span then tells which of them
/// an error is about.
struct Sources {
    /// What errors call each text, and the text. All but the file are padded with line ends, from offset 0 to their
    /// place.
    texts: Vec<(String, String)>,
}

impl Sources {
    fn new(name: &str, file: &str, overrides: &[String]) -> Result<Self, LayeredError> {
        let mut end = file.len() + 1;
        let mut texts = vec![(name.to_string(), file.to_string())];
        for text in overrides {
            let bad = || LayeredError::Override(text.clone());
            let (key, value) = text.split_once('=').ok_or_else(bad)?;
            let quoted = format!("{key} = {}", toml::Value::from(value));
            let line = [text, &quoted].into_iter().find(|t| DeTable::parse(t).is_ok()).ok_or_else(bad)?;
            let padded = "\n".repeat(end) + line;
            end = padded.len() + 1;
            texts.push((format!("--set {text}"), padded));
        }
        Ok(Self { texts })
    }

    fn deserialize<T: DeserializeOwned>(&self) -> Result<T, LayeredError> {
        let mut merged: Option<Spanned<DeTable<'_>>> = None;
        for (_, text) in &self.texts {
            let table = DeTable::parse(text).map_err(|e| self.error(&e, None))?;
            match &mut merged {
                None => merged = Some(table),
                Some(base) => merge(base.get_mut(), table.into_inner(), text),
            }
        }
        let merged = merged.unwrap_or_else(|| Spanned::new(0..0, DeTable::new()));
        T::deserialize(toml::de::Deserializer::from(merged.clone()))
            .map_err(|e| self.error(&e, Some(merged.get_ref())))
    }

    /// Turns a TOML error into one that says where and, for an unknown name, which known one is nearest. `table` is
    /// the document, where it parsed.
    fn error(&self, error: &toml::de::Error, table: Option<&DeTable<'_>>) -> LayeredError {
        let span = error.span().unwrap_or_default();
        let path = table.and_then(|t| find(t, &span)).unwrap_or_default();
        let source = self.texts.iter().position(|(_, text)| span.start <= text.len()).unwrap_or(0);
        // Keys that another kind has were not written for this one.
        let section = path.first().map_or("", String::as_str);
        let kind =
            self.texts[1..].iter().rfind(|(name, _)| name.starts_with(&format!("--set {section}.kind=")));
        let tagged = ["verifier", "environment"].contains(&section);
        if let (Some((name, _)), 0, true) =
            (kind, source, tagged && error.message().starts_with("unknown field"))
        {
            let message = format!(
                "{}; the keys that the file sets for another kind stay: to replace all of [{section}], --set \
                 '{section}={{kind=\"...\", ...}}'",
                explain(error.message(), path.clone())
            );
            return LayeredError::Parse { place: name.clone(), message };
        }
        let (name, text) = &self.texts[source];
        // A missing section is on no line.
        let missing = path.is_empty() && error.message().starts_with("missing field");
        let place = match text.get(..span.start) {
            Some(before) if source == 0 && !missing => format!("{name}:{}", before.matches('\n').count() + 1),
            _ => name.clone(),
        };
        LayeredError::Parse { place, message: explain(error.message(), path) }
    }
}

/// Puts `over`, an override of that text, on top of `base`, table by table. A table keeps the place where the file opens
/// it; one that is written as a whole and chooses a `kind` replaces the other choice with all its keys.
fn merge<'a>(base: &mut DeTable<'a>, over: DeTable<'a>, text: &str) {
    for (key, value) in over {
        let name = key.get_ref().clone();
        let whole = text.as_bytes().get(value.span().start) == Some(&b'{');
        match (base.get_mut(name.as_ref()).map(Spanned::get_mut), value.get_ref()) {
            (Some(DeValue::Table(old)), DeValue::Table(new)) if !(whole && new.contains_key("kind")) => {
                if let DeValue::Table(new) = value.into_inner() {
                    merge(old, new, text);
                }
            }
            _ => {
                // The map would keep the old key, and with it the old place.
                base.remove(name.as_ref());
                base.insert(key, value);
            }
        }
    }
}

/// The path of the key or value that lies at `span`.
fn find(table: &DeTable<'_>, span: &Range<usize>) -> Option<Vec<String>> {
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref().to_string();
        let in_array = value.get_ref().is_array() && value.span().contains(&span.start);
        if key.span() == *span || value.span() == *span || in_array {
            return Some(vec![name]);
        }
        let mut path = find(value.get_ref().as_table()?, span)?;
        path.insert(0, name);
        Some(path)
    })
}

/// The known word closest to `word`, if any is close enough to be what was meant.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let likeness = known.iter().map(|k| (strsim::jaro_winkler(word, k), *k));
    likeness
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}

/// Serde words an unknown name as "unknown field `x`, expected one of `a`, `b`": the names stand between backticks.
fn explain(message: &str, mut path: Vec<String>) -> String {
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let is_key = message.starts_with("unknown field");
    let ([unknown, known @ ..], true) = (&names[..], is_key || message.starts_with("unknown variant")) else {
        return if path.is_empty() { message.to_string() } else { format!("{}: {message}", path.join(".")) };
    };
    let hint = match nearest(unknown, known) {
        Some(name) => format!("did you mean `{name}`?"),
        None if known.is_empty() => "none is known here".to_string(),
        None => format!("known: {}", known.join(", ")),
    };
    if is_key {
        path.pop_if(|last| last == unknown);
        let section =
            if path.is_empty() { "at the top level".into() } else { format!("in [{}]", path.join(".")) };
        format!("unknown key `{unknown}` {section}; {hint}")
    } else {
        format!("{}: unknown value `{unknown}`; {hint}", path.join("."))
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    /// As the verifier's section is: serde buffers the table to find `kind`, and its errors lose their place in it.
    #[derive(Debug, Deserialize)]
    #[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
    #[allow(dead_code, reason = "what is refused is not read")]
    enum Tagged {
        Exact { strict: bool },
        Numeric {},
    }

    #[derive(Debug, Deserialize)]
    #[allow(dead_code, reason = "what is refused is not read")]
    struct Outer {
        verifier: Tagged,
    }

    #[test]
    fn errors_inside_a_tagged_section_name_the_section() {
        for (text, set, message) in [
            (
                "\n[verifier]\nkind = \"exact\"\nstrikt = true",
                "",
                "a:2: unknown key `strikt` in [verifier]; did you mean `strict`?",
            ),
            (
                "[verifier]\nkind = \"exakt\"",
                "",
                "a:2: verifier.kind: unknown value `exakt`; did you mean `exact`?",
            ),
            (
                "[verifier]\nkind = \"numeric\"",
                "verifier.kind=exact",
                "a:1: verifier: missing field `strict`",
            ),
        ] {
            let set = if set.is_empty() { vec![] } else { vec![set.to_string()] };
            let error = parse::<Outer>("a", text, &set).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
    }
}
