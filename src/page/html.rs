//! Markup that cannot be malformed: elements are built by functions, and every text and attribute is escaped on its way in.
//! What comes out is HTML and well-formed XML at once.

use std::fmt::Write;

/// Markup.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Html(String);

impl Html {
    /// Text, which may be hostile.
    pub(super) fn text(text: &str) -> Self {
        Self(escape(text))
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts markup behind it.
    pub(super) fn push(&mut self, more: Html) {
        self.0.push_str(&more.0);
    }
}

impl From<&str> for Html {
    fn from(text: &str) -> Self {
        Self::text(text)
    }
}

impl From<String> for Html {
    fn from(text: String) -> Self {
        Self::text(&text)
    }
}

impl<const N: usize> From<[Html; N]> for Html {
    fn from(parts: [Html; N]) -> Self {
        parts.into_iter().collect()
    }
}

impl FromIterator<Html> for Html {
    fn from_iter<I: IntoIterator<Item = Html>>(parts: I) -> Self {
        let mut all = Self::default();
        parts.into_iter().for_each(|part| all.push(part));
        all
    }
}

/// Attributes by their names.
pub(super) type Attributes<'a> = &'a [(&'static str, &'a str)];

/// An element and its content.
pub(super) fn element(name: &'static str, attributes: Attributes, content: impl Into<Html>) -> Html {
    Html(format!("<{name}{}>{}</{name}>", written(attributes), content.into().0))
}

/// An element without content: one that HTML knows as such, or one of SVG.
pub(super) fn empty(name: &'static str, attributes: Attributes) -> Html {
    Html(format!("<{name}{}/>", written(attributes)))
}

/// A style sheet of ours, which is not escaped.
pub(super) fn style(css: &'static str) -> Html {
    Html(format!("<style>\n{css}</style>"))
}

fn written(attributes: Attributes) -> String {
    attributes.iter().fold(String::new(), |mut out, (name, value)| {
        let _ = write!(out, " {name}=\"{}\"", escape(value));
        out
    })
}

/// A whole page.
pub(super) fn document(head: Html, body: Html) -> String {
    let content = [element("head", &[], head), Html("\n".into()), element("body", &[], body)];
    let attributes = [("lang", "en"), ("xmlns", "http://www.w3.org/1999/xhtml")];
    format!("<!DOCTYPE html>\n{}\n", element("html", &attributes, content).0)
}

/// The text with nothing in it that is markup, and nothing that acts instead of being seen: control characters, what
/// reorders text, and what has no width are written by their names.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            // The pictures of control characters are in their order.
            '\0'..='\u{1f}' => out.extend(char::from_u32(0x2400 + c as u32)),
            '\u{7f}' => out.push('\u{2421}'),
            _ if acts(c) => {
                let _ = write!(out, "\u{27e8}U+{:04X}\u{27e9}", c as u32);
            }
            _ => out.push(c),
        }
    }
    out
}

/// Whether a character changes what is around it, cannot be seen, or may not be in a document.
fn acts(c: char) -> bool {
    matches!(c,
        '\u{80}'..='\u{9f}'
        | '\u{ad}' | '\u{61c}' | '\u{180e}'
        | '\u{200b}' | '\u{200e}' | '\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
        | '\u{fdd0}'..='\u{fdef}'
        | '\u{e0000}'..='\u{e007f}')
        || c as u32 & 0xfffe == 0xfffe
}

/// The first characters of a text, with a sign that there are more.
pub(super) fn short(text: &str, longest: usize) -> String {
    match text.char_indices().nth(longest) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}\u{2026}", &text[..end]),
    }
}

/// A table that scrolls by itself where it is wider than the page, with a caption; in each row the first cell is its head.
pub(super) fn table(caption: &str, head: &[String], rows: Vec<Vec<Html>>) -> Html {
    let column = |name: &String| element("th", &[("scope", "col")], name.as_str());
    let head = element("thead", &[], element("tr", &[], head.iter().map(column).collect::<Html>()));
    let row = |cells: Vec<Html>| {
        let cell = |(i, cell)| match i {
            0 => element("th", &[("scope", "row")], cell),
            _ => element("td", &[], cell),
        };
        element("tr", &[], cells.into_iter().enumerate().map(cell).collect::<Html>())
    };
    let body = element("tbody", &[], rows.into_iter().map(row).collect::<Html>());
    let table = element("table", &[], [element("caption", &[], caption), head, body]);
    // A region that scrolls must be reached by keyboard.
    element(
        "div",
        &[("class", "scroll"), ("role", "region"), ("aria-label", caption), ("tabindex", "0")],
        table,
    )
}

/// Content behind a line that opens it.
pub(super) fn details(summary: &str, content: Html) -> Html {
    element("details", &[], [element("summary", &[], summary), content])
}
