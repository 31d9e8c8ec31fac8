//! Conversations, and the chat template of a checkpoint: Jinja text that turns one into a prompt, as Transformers'
//! `apply_chat_template` does it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value as Jinja, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use thiserror::Error;

use crate::checkpoint::{FileError, read_file};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The text.
    pub content: String,
}

/// Who speaks in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whoever set the conversation up; the first turn, if any.
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// What templates call it.
    fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

/// Why there is no prompt of a conversation.
#[derive(Debug, Error)]
pub enum ChatError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// No file of the directory holds a template.
    #[error(
        "{path} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): put the one that the \
         model was tuned to there, or leave out what asks for it"
    )]
    None {
        /// The model directory.
        path: PathBuf,
    },
    /// The template is no Jinja.
    #[error("{path}: not a chat template: {problem}")]
    Template {
        /// Its file.
        path: PathBuf,
        /// What is wrong, and in which line of the template.
        problem: String,
    },
    /// The template refuses the conversation, or fails on it.
    #[error("the chat template of {path} takes no such conversation: {problem}")]
    Refused {
        /// Its file.
        path: PathBuf,
        /// The template's own words, where it has some.
        problem: String,
    },
}

/// Gemma 3's tokenizer_config.json, with a line for each of its 6,000 reserved tokens, has 1.2 MB.
pub const MAX_TEMPLATE_BYTES: u64 = 64 << 20;
/// Instructions that a template may take for one prompt, so that none runs for ever.
const MAX_FUEL: u64 = 100_000_000;
/// The name of the template among minijinja's.
const NAME: &str = "chat_template";

/// The text of a directory's chat template and its file, in the order in which Transformers prefers them.
pub fn template_text(dir: &Path) -> Option<(PathBuf, String)> {
    let read = |name: &str| {
        let path = dir.join(name);
        let text = String::from_utf8(read_file(&path, MAX_TEMPLATE_BYTES).ok()?).ok()?;
        let template = match name.ends_with(".json") {
            true => {
                named_default(serde_json::from_str::<Value>(&text).ok()?.get_mut("chat_template")?.take())?
            }
            false => text,
        };
        Some((path, template))
    };
    ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"].into_iter().find_map(read)
}

/// The template in a JSON file: one, or a list of them by name, of which `default` is for conversations.
fn named_default(value: Value) -> Option<String> {
    match value {
        Value::String(template) => Some(template),
        Value::Array(list) => {
            let default = list.into_iter().find(|entry| entry["name"] == "default")?;
            Some(default["template"].as_str()?.to_owned())
        }
        _ => None,
    }
}

/// A checkpoint's chat template, parsed.
#[derive(Debug)]
pub struct ChatTemplate {
    path: PathBuf,
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Reads and parses the template of a model directory.
    pub fn open(dir: &Path) -> Result<Self, ChatError> {
        let (path, text) = template_text(dir).ok_or_else(|| ChatError::None { path: dir.to_owned() })?;
        let mut environment = Environment::new();
        match SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
            Ok(syntax) => environment.set_syntax(syntax),
            Err(e) => return Err(ChatError::Template { path, problem: told(&e) }),
        }
        environment.set_fuel(Some(MAX_FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", tojson);
        if let Err(e) = environment.add_template_owned(NAME, text) {
            return Err(ChatError::Template { path, problem: told(&e) });
        }
        Ok(Self { path, environment })
    }

    /// The text of a conversation up to where the model's turn begins. The names of control tokens in it are the
    /// template's: those that a message spells come with `guard` behind their first character, and so does nothing else.
    /// No message may contain `guard`.
    pub fn render(
        &self,
        messages: &[Message],
        guard: char,
        spelled: impl Fn(&str) -> Vec<String>,
    ) -> Result<String, ChatError> {
        let guarded = |message: &Message| {
            let names = spelled(&message.content);
            let guard_in = |text: String, name: &String| {
                let mut chars = name.chars();
                let first: String = chars.next().into_iter().chain([guard]).collect();
                text.replace(name.as_str(), &(first + chars.as_str()))
            };
            let content = names.iter().fold(message.content.clone(), guard_in);
            context! { role => message.role.name(), content }
        };
        let messages: Vec<Jinja> = messages.iter().map(guarded).collect();
        let refused =
            |e: Error| ChatError::Refused { path: self.path.clone(), problem: told(&e).replace(guard, "") };
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let values = context! {
            messages,
            add_generation_prompt => true,
            bos_token => "<bos>",
            eos_token => "<eos>",
            pad_token => "<pad>",
            unk_token => "<unk>",
        };
        template.render(values).map_err(refused)
    }
}

/// A value as Python's `json.dumps` writes it, which is what Transformers' templates get: text as it is, spaces behind commas
/// and colons, and with an `indent` lines.
fn tojson(value: Jinja, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut text = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width);
            let lines = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut text, lines)).map_err(failed)?;
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut text, Spaced)).map_err(failed)?,
    }
    String::from_utf8(text).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// JSON on one line, with a space behind each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// An error of minijinja as a sentence with the line of the template.
fn told(error: &Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{detail} (line {line} of the template)"),
        None => detail,
    }
}
