//! Progress for people: bars on a terminal, plain lines elsewhere. Standard output is for results alone.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::eval::{Unjudged, count_by_kind};

/// Standard error: lines, and on a terminal bars below them.
#[derive(Default)]
pub(super) struct Screen {
    /// Draws nothing where standard error is no terminal.
    bars: MultiProgress,
}

impl Screen {
    /// A bar of `length` units in a template of indicatif's.
    pub(super) fn bar(&self, length: u64, template: &str) -> ProgressBar {
        self.add(ProgressBar::new(length), template)
    }

    /// A bar of responses that are being sampled.
    pub(super) fn responses(&self, length: u64) -> ProgressBar {
        self.bar(length, "evaluating {wide_bar} {pos}/{len} responses, {eta} left")
    }

    /// Work of unknown length.
    pub(super) fn spinner(&self, template: &str) -> ProgressBar {
        self.add(ProgressBar::new_spinner(), template)
    }

    fn add(&self, bar: ProgressBar, template: &str) -> ProgressBar {
        let style = ProgressStyle::with_template(template).expect("templates are this program's own");
        let bar = self.bars.add(bar.with_style(style));
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }

    /// Whether bars are to be seen.
    pub(super) fn has_bars(&self) -> bool {
        !self.bars.is_hidden()
    }

    /// A line, above the bars.
    pub(super) fn line(&self, text: &str) {
        self.bars.suspend(|| note(text));
    }
}

/// A line on standard error. That nobody reads it is no reason to stop working.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// The news that responses could not be judged: of each kind of reason that is not in `told` yet, how many there are, the
/// first in full, and `place`, where to find the others.
pub(super) fn unjudged(responses: &[Unjudged], place: &str, told: &mut BTreeSet<String>) -> Vec<String> {
    let mut news = Vec::new();
    for (kind, count) in count_by_kind(responses) {
        let Some(first) = responses.iter().find(|response| response.kind == kind) else { continue };
        if told.insert(kind.clone()) {
            news.push(format!(
                "warning: {count} responses could not be judged ({kind}); they count as wrong\n  the first, by the {}: \
                 {}\n  {place}",
                first.judge,
                first.reason.replace('\n', "\n  ")
            ));
        }
    }
    news
}

/// `1h 02m`, `3m 20s` or `45s`.
pub(super) fn duration(seconds: f64) -> String {
    let s = seconds.round().max(0.0) as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m {:02}s", s / 60, s % 60),
        _ => format!("{}h {:02}m", s / 3600, s / 60 % 60),
    }
}
