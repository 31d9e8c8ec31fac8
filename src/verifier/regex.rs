//! `regex`: what a pattern captures is the answer. The regex crate matches in linear time, so that no response can
//! stall it.

use super::{BuildError, Failure, Pick, Request, Verifier};

pub(super) struct Regex {
    pattern: ::regex::Regex,
    group: usize,
    pick: Pick,
}

impl Regex {
    pub(super) fn new(pattern: &str, group: Option<usize>, pick: Pick) -> Result<Self, BuildError> {
        let pattern = ::regex::Regex::new(pattern).map_err(|e| BuildError::Pattern(Box::new(e)))?;
        let last = pattern.captures_len() - 1;
        let group = group.unwrap_or(last.min(1));
        if group > last {
            return Err(BuildError::Group { group, last });
        }
        Ok(Self { pattern, group, pick })
    }

    /// A match in which the group took no part is no match.
    fn capture<'a>(&self, response: &'a str) -> Option<&'a str> {
        let captures = self.pattern.captures_iter(response).filter_map(|c| c.get(self.group));
        self.pick.of(captures).map(|m| m.as_str().trim())
    }
}

impl Verifier for Regex {
    fn score(&self, request: &Request) -> Result<f64, Failure> {
        Ok(f64::from(self.capture(request.response) == Some(request.answer.trim())))
    }

    fn extract(&self, response: &str) -> Option<String> {
        self.capture(response).map(str::to_owned)
    }
}
