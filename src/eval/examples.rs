//! A few responses of an evaluation, to look at: those of the problems that go best and worst, and of those where the
//! verifier is wrong.

use serde::{Deserialize, Serialize};

use super::estimators::best_of_n;
use super::{Judged, Sample};

/// Most characters of a text that are kept.
const MAX_CHARS: usize = 1500;
/// Most responses to a problem.
const RESPONSES: usize = 4;

/// Why a problem is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The verifier's choice among all samples is wrong, although others are right.
    Disagreement,
    /// Its samples are right the least often.
    Worst,
    /// Its samples are right the most often.
    Best,
}

/// A problem and some of its responses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// Why it is shown.
    pub why: Why,
    /// The problem's number in its file, from 1.
    pub number: usize,
    /// What the model was asked.
    pub prompt: Text,
    /// What a right response amounts to.
    pub answer: Text,
    /// The share of right samples.
    pub pass_rate: f64,
    /// The chance that the sample with the best score is right.
    pub best_of_all: f64,
    /// Samples.
    pub samples: usize,
    /// Of the samples the verifier's choice, the best scored that is right and that is wrong, and the last in its order.
    pub responses: Vec<Shown>,
}

/// A response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    /// Its text.
    pub text: Text,
    /// How many of the samples have this text.
    pub count: usize,
    /// The verifier's score.
    pub score: f64,
    /// The reward.
    pub reward: f64,
    /// Whether that passes.
    pub correct: bool,
    /// The answer that was read in it.
    pub answer: Option<Text>,
    /// Its length.
    pub tokens: usize,
    /// Whether the length limit cut it.
    pub truncated: bool,
}

/// The beginning of a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    /// The beginning.
    pub text: String,
    /// Characters that are left out behind it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left_out: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl Text {
    /// The first characters of a text.
    pub fn of(text: &str) -> Self {
        match text.char_indices().nth(MAX_CHARS) {
            None => Self { text: text.to_owned(), left_out: 0 },
            Some((end, _)) => Self { text: text[..end].to_owned(), left_out: text[end..].chars().count() },
        }
    }
}

/// The most telling problems of those it was offered: a number of each kind, whatever their order and number.
#[derive(Debug)]
pub struct Examples {
    each: usize,
    /// By kind, the most telling first, with what tells: the more the better.
    kept: [(Why, Vec<(f64, Example)>); 3],
}

impl Examples {
    /// Keeps up to `each` problems of each kind.
    pub fn new(each: usize) -> Self {
        Self { each, kept: [Why::Disagreement, Why::Worst, Why::Best].map(|why| (why, Vec::new())) }
    }

    /// Offers the problem of this number, from 1: what it asks, its answer and its pool.
    pub fn offer(&mut self, number: usize, prompt: &str, answer: &str, pool: &[Judged]) {
        if self.each == 0 || pool.is_empty() {
            return;
        }
        let right = pool.iter().filter(|judged| judged.sample.correct).count();
        let pass_rate = right as f64 / pool.len() as f64;
        let samples: Vec<Sample> = pool.iter().map(|judged| judged.sample.clone()).collect();
        let best_of_all = best_of_n(&samples, pool.len());
        for (why, kept) in &mut self.kept {
            let telling = match why {
                Why::Disagreement if right > 0 && best_of_all < 1.0 - 1e-9 => 1.0 - best_of_all,
                Why::Disagreement => continue,
                Why::Worst => -pass_rate,
                Why::Best => pass_rate,
            };
            // Of equally telling ones the first.
            let place = kept.partition_point(|(other, example)| {
                *other > telling || (*other == telling && example.number < number)
            });
            if place >= self.each {
                continue;
            }
            let example = Example {
                why: *why,
                number,
                prompt: Text::of(prompt),
                answer: Text::of(answer),
                pass_rate,
                best_of_all,
                samples: pool.len(),
                responses: telling_responses(pool),
            };
            kept.insert(place, (telling, example));
            kept.truncate(self.each);
        }
    }

    /// What was kept, each problem once.
    pub fn into_list(self) -> Vec<Example> {
        let mut list: Vec<Example> = Vec::new();
        for (_, example) in self.kept.into_iter().flat_map(|(_, kept)| kept) {
            if list.iter().all(|other| other.number != example.number) {
                list.push(example);
            }
        }
        list
    }
}

/// Responses with different texts, in the verifier's order.
fn telling_responses(pool: &[Judged]) -> Vec<Shown> {
    let mut order: Vec<usize> = (0..pool.len()).collect();
    order.sort_by(|&a, &b| pool[b].sample.score.total_cmp(&pool[a].sample.score).then(a.cmp(&b)));
    let first = |correct: bool| order.iter().copied().find(|&i| pool[i].sample.correct == correct);
    let wanted = [order.first().copied(), first(true), first(false), order.last().copied()];
    let mut chosen: Vec<usize> = Vec::new();
    for i in wanted.into_iter().flatten() {
        if chosen.len() < RESPONSES && chosen.iter().all(|&other| pool[other].text != pool[i].text) {
            chosen.push(i);
        }
    }
    chosen.sort_by_key(|i| order.iter().position(|other| other == i));
    let shown = |i: usize| {
        let Judged { text, reward, sample, .. } = &pool[i];
        Shown {
            text: Text::of(text),
            count: pool.iter().filter(|other| other.text == *text).count(),
            score: sample.score,
            reward: *reward,
            correct: sample.correct,
            answer: sample.answer.as_deref().map(Text::of),
            tokens: sample.tokens,
            truncated: sample.truncated,
        }
    };
    chosen.into_iter().map(shown).collect()
}
