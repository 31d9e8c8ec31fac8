//! Plain text to the one string that all spellings of an answer share.

use super::{DEEPEST, Work, arithmetic};

/// The key of a plain text: equal answers have equal keys.
pub(super) fn key(text: &str, work: Work, depth: usize) -> String {
    if depth > DEEPEST {
        return text.to_owned();
    }
    let inner = |text: &str| key(text, work, depth + 1);
    let text = text.trim();
    if let Some(text) = text.strip_prefix('+').filter(|rest| !rest.is_empty()) {
        return inner(text);
    }
    if let Some((left, right, inside)) = open_interval(text) {
        return inner(&format!("{left}{inside}{right}"));
    }
    if text.contains('±') {
        return inner(&format!("{},{}", text.replace('±', "+"), text.replace('±', "-")));
    }
    let parts = split(text, ",");
    if parts.len() > 1 {
        // `x=1, x=2` lists values of x; `x=1, y=2` says which is which.
        let mut names: Vec<&str> = parts.iter().filter_map(|part| name(part)).map(|(name, _)| name).collect();
        names.sort_unstable();
        names.dedup();
        let named = |part: &str| match name(part) {
            Some((name, value)) if names.len() > 1 => format!("{name}={}", inner(value)),
            _ => inner(part),
        };
        let mut keys: Vec<String> = parts.into_iter().map(named).collect();
        keys.sort_unstable();
        return keys.join(",");
    }
    let text = name(text).map_or(text, |(_, value)| value);
    let sides = split(text, "=");
    if let [first, .., last] = sides[..] {
        // `2+2 = 4`, which says nothing false.
        if sides.iter().all(|side| arithmetic::equal(first, side)) {
            return inner(last);
        }
    }
    for relation in ["∪", "∩", "∖", "<≤>≥≠"] {
        let mut sides = split(text, relation);
        if sides.len() < 2 {
            continue;
        }
        let mut signs: Vec<char> = sides.iter().skip(1).filter_map(|s| before(text, s)).collect();
        // `5 > x` is `x < 5`.
        if signs.iter().all(|sign| ">≥".contains(*sign)) {
            sides.reverse();
            signs.reverse();
            signs.iter_mut().for_each(|sign| *sign = if *sign == '>' { '<' } else { '≤' });
        }
        let mut keys: Vec<String> = sides.into_iter().map(inner).collect();
        if relation == "∪" || relation == "∩" {
            keys.sort_unstable();
        }
        let first = keys.remove(0);
        return signs.into_iter().zip(keys).fold(first, |all, (sign, key)| format!("{all}{sign}{key}"));
    }
    if let Some((left, inside, right)) = bracketed(text) {
        if matches!((left, right), ('(', ')') | ('[', ']')) && is_matrix(inside) {
            return inside.to_owned();
        }
        let mut keys: Vec<String> = split(inside, ",").into_iter().map(inner).collect();
        match (left, right) {
            ('(', ')') if keys.len() == 1 => return keys.remove(0),
            ('{', _) => {
                keys.sort_unstable();
                keys.dedup();
            }
            _ => {}
        }
        let all = format!("{left}{}{right}", keys.join(","));
        return if all == "(-∞,∞)" { "ℝ".to_owned() } else { all };
    }
    match arithmetic::value(text, work) {
        Ok(value) => value,
        Err(true) => {
            // As it is written, but for the order of factors.
            let mut factors = split(text, "*");
            factors.sort_unstable();
            factors.join("*")
        }
        Err(false) => words(text, depth),
    }
}

/// The key of what is no number.
fn words(text: &str, depth: usize) -> String {
    // Words are the same in any case; `AB` and `ab`, `x` and `X` are not words.
    let letters = text.len() > 1 && text.bytes().all(|c| c.is_ascii_alphabetic());
    if letters && text.bytes().any(|c| c.is_ascii_lowercase()) {
        return text.to_ascii_lowercase();
    }
    // A product needs its sign only before a number: `2*x` is `2x`.
    let mut factors = text.split('*');
    let mut product = factors.next().unwrap_or_default().to_owned();
    for factor in factors {
        let implied = factor.starts_with(|c: char| c.is_alphabetic() || "(\\√∛".contains(c));
        product += if implied { "" } else { "*" };
        product += factor;
    }
    ordered(&product, depth)
}

/// Terms of a sum, and factors in parentheses, in one order. All else stays as it is.
fn ordered(text: &str, depth: usize) -> String {
    let terms = terms(text).filter(|_| depth <= DEEPEST);
    let Some(terms) = terms else { return text.to_owned() };
    let mut terms: Vec<String> = terms
        .into_iter()
        .map(|(sign, term)| format!("{sign}{}", factors(term, depth).unwrap_or_else(|| term.to_owned())))
        .collect();
    terms.sort_unstable();
    let sum = terms.concat();
    sum.strip_prefix('+').map_or(sum.clone(), str::to_owned)
}

/// The terms of a sum with their signs. `None` where `+` and `-` may not be what they look like.
fn terms(text: &str) -> Option<Vec<(char, &str)>> {
    if text.contains([' ', ',', ':', ';', '|', '…', '→', '∖', '⟦', '"']) {
        return None;
    }
    let (mut found, mut sign, mut from, mut depth) = (Vec::new(), '+', 0, 0usize);
    for (i, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' | '⟨' => depth += 1,
            ')' | ']' | '}' | '⟩' => depth = depth.checked_sub(1)?,
            '+' | '-' if depth == 0 => {
                if i > 0 {
                    found.push((sign, &text[from..i]));
                }
                (sign, from) = (c, i + 1);
            }
            _ => {}
        }
    }
    found.push((sign, &text[from..]));
    let operand = |term: &str| !term.is_empty() && !term.ends_with(['^', '_', '*', '/', '\\', '⊕', '÷']);
    (depth == 0 && found.iter().all(|(_, term)| operand(term))).then_some(found)
}

/// A number and factors in parentheses, `2(x+1)^2(x-1)`, in one order.
fn factors(term: &str, depth: usize) -> Option<String> {
    let number = |text: &str| text.bytes().take_while(|c| c.is_ascii_digit() || *c == b'.').count();
    let (coefficient, mut rest) = term.split_at(number(term));
    let mut found = Vec::new();
    while !rest.is_empty() {
        let mut open = 0usize;
        let end = rest.char_indices().find_map(|(i, c)| {
            open = if c == '(' { open + 1 } else { open.saturating_sub(usize::from(c == ')')) };
            (open == 0).then_some(i)
        })?;
        let inside = rest[..end].strip_prefix('(')?;
        let power = rest[end + 1..].strip_prefix('^').map_or(0, |power| 1 + number(power));
        let (factor, after) = rest.split_at(end + 1 + power);
        found.push(format!("({}){}", ordered(inside, depth + 1), &factor[end + 1..]));
        rest = after;
    }
    found.sort_unstable();
    Some(coefficient.to_owned() + &found.concat())
}

/// Splits `x=5`, `f(x)=5` and `x∈S` into name and value.
fn name(text: &str) -> Option<(&str, &str)> {
    let (name, value) = text.trim().split_once(['=', '∈'])?;
    let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || "(\\".contains(c))
        && name.bytes().any(|c| c.is_ascii_alphabetic())
        // `\text{not } x = 5`
        && !name.starts_with("not")
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_(),\\'".contains(c));
    (is_name && !value.is_empty() && !value.contains(['=', '∈'])).then_some((name, value))
}

/// The parts between separators that are in no bracket.
fn split<'a>(text: &'a str, separators: &str) -> Vec<&'a str> {
    let mut depth = 0usize;
    text.split(|c: char| {
        match c {
            '(' | '[' | '{' | '⟨' | '⟦' => depth += 1,
            ')' | ']' | '}' | '⟩' | '⟧' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && separators.contains(c)
    })
    .collect()
}

/// The character of `text` that stands before `part` of it.
fn before(text: &str, part: &str) -> Option<char> {
    text[..part.as_ptr() as usize - text.as_ptr() as usize].chars().next_back()
}

/// Splits `(inside)` if the first bracket closes at the end; half-open intervals mix brackets.
fn bracketed(text: &str) -> Option<(char, &str, char)> {
    let left = text.chars().next().filter(|c| "([{⟨".contains(*c))?;
    let mut depth = 0usize;
    for (i, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' | '⟨' | '⟦' => depth += 1,
            ')' | ']' | '}' | '⟩' | '⟧' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            let end = i + c.len_utf8() == text.len();
            return end.then(|| (left, &text[left.len_utf8()..i], c));
        }
    }
    None
}

fn is_matrix(text: &str) -> bool {
    text.strip_prefix('⟦').and_then(|t| t.strip_suffix('⟧')).is_some_and(|t| !t.contains(['⟦', '⟧']))
}

/// `]a,b[`, `[a,b[` and `]a,b]`, with the brackets that they stand for.
fn open_interval(text: &str) -> Option<(char, char, &str)> {
    let left = text.chars().next().filter(|c| "[]".contains(*c))?;
    let right = text.chars().next_back().filter(|c| "[]".contains(*c) && text.len() > 2)?;
    let inside = &text[1..text.len() - 1];
    let french = (left, right) != ('[', ']') && split(inside, ",").len() == 2 && !inside.contains(['[', ']']);
    french.then_some((if left == ']' { '(' } else { '[' }, if right == '[' { ')' } else { ']' }, inside))
}
