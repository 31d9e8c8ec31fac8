//! `exact`: the whole response is the answer.

use super::{Failure, Request, Verifier};

pub(super) struct Exact {
    pub(super) case_insensitive: bool,
}

impl Exact {
    fn normal(&self, text: &str) -> String {
        let text = text.trim();
        if self.case_insensitive { text.to_lowercase() } else { text.to_owned() }
    }
}

impl Verifier for Exact {
    fn score(&self, request: &Request) -> Result<f64, Failure> {
        Ok(f64::from(self.normal(request.response) == self.normal(request.answer)))
    }

    fn extract(&self, response: &str) -> Option<String> {
        Some(self.normal(response)).filter(|answer| !answer.is_empty())
    }
}
