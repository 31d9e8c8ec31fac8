//! Text <-> token ids: a thin layer over the `tokenizers` crate, and Gemma's turn template.
//!
//! Text never becomes a control token: `<end_of_turn>` in a prompt is encoded as the characters it is made of,
//! where Transformers would end the turn. A data set or a user can so not forge a turn, and a control token in a
//! sequence always means that the engine put it there. Which tokens are control tokens is known by their names in the
//! vocabulary ([`role`]) and by the model's end tokens: the file's `special` flag may add to them, but Gemma 1's and 2's
//! files leave it off tokens that it belongs to.
//!
//! The text of tokens is a function of each of them alone: its bytes, one after the other ([`Tokenizer::bytes`]). So a
//! text only grows as tokens follow, and a run of byte tokens that ends within a character keeps its whole ones.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, de};
use serde_json::{Value, json};
use tokenizers::AddedToken;
use tokenizers::models::bpe;

use crate::chat::{ChatError, ChatTemplate, Message, Role as Speaker};
use crate::checkpoint::{FileError, read_file};
use crate::gemma::config::{GemmaConfig, MAX_SPARE_ROWS};

/// The tokenizer, in a Hugging Face directory.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Gemma's have up to 34 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// A space in the vocabulary's pieces.
const SPACE: &str = "\u{2581}";
/// What decoders that handle each token by itself are made of.
const DECODERS: [&str; 5] = ["Sequence", "Replace", "ByteFallback", "Fuse", "Metaspace"];

/// Why a tokenizer cannot be used, or a text not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not a tokenizer.json that the `tokenizers` crate understands.
    #[error("{}: not a valid tokenizer", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: tokenizers::Error,
    },
    /// A control token is missing.
    #[error("{}: has no token {token:?}: not a Gemma tokenizer", path.display())]
    NoToken {
        /// The file.
        path: PathBuf,
        /// The token.
        token: &'static str,
    },
    /// The tokenizer belongs to another model than config.json.
    #[error("{}: {problem}; take {TOKENIZER_FILE} and config.json from the same model", path.display())]
    OtherModel {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        problem: String,
    },
    /// A text that the tokenizer cannot encode.
    #[error("the tokenizer failed on this text")]
    Text(#[source] tokenizers::Error),
    /// A vocabulary whose merges lead to a control token.
    #[error(
        "the tokenizer makes the control token {token} from text; take the model's original {TOKENIZER_FILE}"
    )]
    Forged {
        /// The token.
        token: String,
    },
}

/// Why a conversation does not become tokens.
#[derive(Debug, thiserror::Error)]
pub enum ChatTextError {
    /// The template.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Turns where nothing writes turns.
    #[error(
        "the task is a conversation, and data.template = \"none\" writes no turns; set it to \"chat\", the template of the \
         model, or to \"turn\", Gemma's turns"
    )]
    NoTurns,
}

/// What a token of a Gemma vocabulary is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It stands for the text of its name.
    Text,
    /// A placeholder without training of its own: no text becomes it, but a model that was tuned to use it says its
    /// name.
    Reserved,
    /// It steers the model: no text becomes it, and it is no part of any text.
    Control,
}

/// The role of a token by its name, in the vocabularies of Gemma 1 to 4 and of models tuned from them.
pub fn role(name: &str) -> Role {
    match name {
        "<pad>" | "<eos>" | "<bos>" | "<unk>" | "<mask>" | "<2mass>" | "[@BOS@]" | "[multimodal]" => {
            Role::Control
        }
        "<start_of_turn>" | "<end_of_turn>" => Role::Control,
        "<start_of_image>" | "<end_of_image>" | "<image_soft_token>" => Role::Control,
        "<start_of_audio>" | "<end_of_audio>" | "<audio_soft_token>" => Role::Control,
        // <|name|>, and in Gemma 4 pairs such as <|turn> and <turn|>.
        _ if name.len() > 4
            && (name.starts_with("<|") && name.ends_with('>')
                || name.starts_with('<') && name.ends_with("|>")) =>
        {
            Role::Control
        }
        _ => match name.strip_prefix("<unused").and_then(|rest| rest.strip_suffix('>')) {
            Some(number) if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => {
                Role::Reserved
            }
            _ => Role::Text,
        },
    }
}

/// How a vocabulary spells turns.
struct TurnNames {
    start: &'static str,
    end: &'static str,
    /// Whether the system has a turn of its own.
    system: bool,
}

/// Gemma 1 to 3, and Gemma 4.
const TURNS: [TurnNames; 2] = [
    TurnNames { start: "<start_of_turn>", end: "<end_of_turn>", system: false },
    TurnNames { start: "<|turn>", end: "<turn|>", system: true },
];

/// Whether a chat template writes the turns of [`Tokenizer::encode_turns`]. Those of some Gemma 4 models begin the model's with
/// an empty thought.
pub fn writes_turns(template: &str) -> bool {
    let begin = template.rsplit("add_generation_prompt").next().unwrap_or_default();
    let thought = template.contains("add_generation_prompt") && begin.contains("<|channel>");
    let writes =
        |turn: &TurnNames| [turn.start, turn.end, "model"].iter().all(|part| template.contains(part));
    TURNS.iter().any(writes) && !thought
}

/// Gemma's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Tokens that no text becomes, by name.
    no_text: BTreeMap<String, u32>,
    /// Tokens that are no part of any text.
    control: HashSet<u32>,
    bos: u32,
    eos: u32,
    start_of_turn: u32,
    end_of_turn: u32,
    /// Whether the system has a turn of its own.
    system_turn: bool,
}

/// tokenizer.json, with its large parts in the types that the `tokenizers` crate wants in the end: its own way copies
/// half a million merges five times.
#[derive(Deserialize)]
struct File {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default = "version")]
    version: String,
}

fn version() -> String {
    "1.0".to_owned()
}

/// Byte pair encoding, what Gemma has. The prefix, on which the crate panics, and the suffix, which the text of a token
/// does not know, are null; a dropout of merges is left out, because it would make a text's tokens random.
#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type", default)]
    _kind: Kind,
    #[serde(rename = "continuing_subword_prefix", default)]
    _prefix: (),
    #[serde(rename = "end_of_word_suffix", default)]
    _suffix: (),
    unk_token: Option<String>,
    #[serde(default, deserialize_with = "or_null")]
    fuse_unk: bool,
    #[serde(default, deserialize_with = "or_null")]
    byte_fallback: bool,
    #[serde(default, deserialize_with = "or_null")]
    ignore_merges: bool,
    vocab: bpe::Vocab,
    merges: Vec<Merge>,
}

#[derive(Deserialize, Default)]
enum Kind {
    #[default]
    #[serde(rename = "BPE")]
    Bpe,
}

fn or_null<'de, D: Deserializer<'de>>(value: D) -> Result<bool, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or_default())
}

/// Two tokens that are joined: `["a", "b"]`, in older files `"a b"`.
struct Merge(String, String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        struct Parts;

        impl<'de> de::Visitor<'de> for Parts {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a merge of two tokens")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Merge, E> {
                match text.split_once(' ') {
                    Some((a, b)) if !b.contains(' ') => Ok(Merge(a.to_owned(), b.to_owned())),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut parts: A) -> Result<Merge, A::Error> {
                let mut next = |i| parts.next_element()?.ok_or_else(|| de::Error::invalid_length(i, &self));
                let merge = Merge(next(0)?, next(1)?);
                match parts.next_element::<de::IgnoredAny>()? {
                    None => Ok(merge),
                    Some(_) => Err(de::Error::invalid_length(3, &self)),
                }
            }
        }

        value.deserialize_any(Parts)
    }
}

impl File {
    /// The crate's tokenizer, and what its vocabulary holds.
    fn build(self) -> Result<(tokenizers::Tokenizer, Vocabulary), tokenizers::Error> {
        let Model { unk_token, fuse_unk, byte_fallback, ignore_merges, vocab, merges, .. } = self.model;
        let roles = vocab.iter().filter(|(name, _)| role(name) != Role::Text);
        let vocabulary = Vocabulary {
            ids: vocab.values().copied().collect(),
            no_text: roles.map(|(name, id)| (name.clone(), *id)).collect(),
        };
        let merges = merges.into_iter().map(|Merge(a, b)| (a, b)).collect();
        let mut model = bpe::BPE::builder()
            .vocab_and_merges(vocab, merges)
            .fuse_unk(fuse_unk)
            .byte_fallback(byte_fallback)
            .ignore_merges(ignore_merges);
        if let Some(token) = unk_token {
            model = model.unk_token(token);
        }
        // All but the model and the added tokens, which are to be found in it.
        let parts = json!({
            "version": self.version,
            "normalizer": self.normalizer,
            "pre_tokenizer": self.pre_tokenizer,
            "post_processor": self.post_processor,
            "decoder": self.decoder,
            "model": { "type": "BPE", "vocab": {}, "merges": [] },
        });
        let mut tokenizer: tokenizers::Tokenizer = serde_json::from_value(parts)?;
        tokenizer.with_model(model.build()?).add_tokens(&self.added_tokens);
        tokenizer.set_encode_special_tokens(true);
        Ok((tokenizer, vocabulary))
    }
}

/// What is asked of a vocabulary without its added tokens.
struct Vocabulary {
    /// All ids.
    ids: Vec<u32>,
    /// The tokens whose names say that no text becomes them.
    no_text: Vec<(String, u32)>,
}

impl Tokenizer {
    /// Loads `tokenizer.json` and checks it against the model's vocabulary and BOS token.
    pub fn open(dir: &Path, config: &GemmaConfig) -> Result<Self, TokenizerError> {
        let path = dir.join(TOKENIZER_FILE);
        let bytes = read_file(&path, MAX_TOKENIZER_BYTES)?;
        let format = |source| TokenizerError::Format { path: path.clone(), source };
        let file = serde_json::from_slice::<File>(&bytes).map_err(|e| format(e.into()))?;
        drop(bytes);
        if let Some(name) = foreign_decoder(&file.decoder) {
            return Err(format(format!("its decoder is {name}, which is not Gemma's").into()));
        }
        let (mut inner, vocabulary) = file.build().map_err(format)?;

        let id = |token| {
            inner.token_to_id(token).ok_or_else(|| TokenizerError::NoToken { path: path.clone(), token })
        };
        let (bos, eos) = (id("<bos>")?, id("<eos>")?);
        let has =
            |turn: &&TurnNames| [turn.start, turn.end].iter().all(|name| inner.token_to_id(name).is_some());
        let turn = TURNS.iter().find(has).unwrap_or(&TURNS[0]);
        let (start_of_turn, end_of_turn) = (id(turn.start)?, id(turn.end)?);

        let added = inner.get_added_tokens_decoder();
        let role_of = |name: &str, id: u32| match (role(name), added.get(&id)) {
            (Role::Control, _) => Role::Control,
            (_, Some(token)) if token.special => Role::Control,
            // An end token may be a word of the vocabulary, such as a line break: that stays text.
            (_, Some(_)) if config.eos_tokens.contains(&id) && !name.trim().is_empty() => Role::Control,
            (role, _) => role,
        };
        let (mut no_text, mut control) = (BTreeMap::new(), HashSet::new());
        let added_names = added.iter().map(|(id, token)| (token.content.clone(), *id));
        for (name, id) in vocabulary.no_text.into_iter().chain(added_names) {
            let role = role_of(&name, id);
            if role == Role::Control {
                control.insert(id);
            }
            if role != Role::Text {
                no_text.insert(name, id);
            }
        }
        let ids = vocabulary.ids.iter().chain(added.keys());
        let largest = ids.filter(|id| !control.contains(id)).max().map_or(0, |id| *id as usize);
        let unmarked =
            added.iter().filter(|(_, token)| !token.special && no_text.contains_key(&token.content));
        let marked: Vec<_> = unmarked.map(|(_, token)| token.clone().special(true)).collect();
        inner.add_special_tokens(&marked);

        let other_model = |problem| Err(TokenizerError::OtherModel { path: path.clone(), problem });
        let vocab_size = config.vocab_size;
        // A control token may lie beyond the embedding, since text never becomes one: Gemma 3's text models have
        // the token of an image there.
        if largest >= vocab_size || largest + 1 + MAX_SPARE_ROWS < vocab_size {
            return other_model(format!(
                "its tokens end at {largest}, but config.json has vocab_size = {vocab_size}"
            ));
        }
        if bos != config.bos_token {
            return other_model(format!(
                "<bos> is {bos}, but config.json has bos_token_id = {}",
                config.bos_token
            ));
        }
        if let Some(id) = [eos, start_of_turn, end_of_turn].into_iter().find(|&id| id as usize >= vocab_size)
        {
            return other_model(format!("control token {id} lies beyond vocab_size = {vocab_size}"));
        }
        let system_turn = turn.system;
        Ok(Self { inner, no_text, control, bos, eos, start_of_turn, end_of_turn, system_turn })
    }

    /// `<bos>`, with which every sequence begins.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// `<eos>`.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// `<start_of_turn>`, in Gemma 4 `<|turn>`.
    pub fn start_of_turn(&self) -> u32 {
        self.start_of_turn
    }

    /// `<end_of_turn>`, in Gemma 4 `<turn|>`.
    pub fn end_of_turn(&self) -> u32 {
        self.end_of_turn
    }

    /// The tokens of `text` alone: what follows a prompt, for instance an expert's response. A character that the
    /// vocabulary has neither as a token nor in bytes becomes `<unk>`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, false).map_err(TokenizerError::Text)?;
        let unknown = self.no_text.get("<unk>");
        match encoding.get_ids().iter().find(|id| self.control.contains(id) && Some(*id) != unknown) {
            None => Ok(encoding.get_ids().to_vec()),
            Some(&id) => Err(TokenizerError::Forged { token: self.name(id) }),
        }
    }

    /// BOS and `text`: a prompt to be continued.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        Ok([vec![self.bos], self.encode(text)?].concat())
    }

    /// BOS and a conversation in Gemma's turns, up to where the model's begins:
    /// `<bos><start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n`, with the names of the vocabulary. As by the
    /// models' chat templates, space around a turn is trimmed, and what the system says stands at the head of the user's
    /// first turn, or in Gemma 4 in a turn of its own. Nothing asks Gemma 4 to think.
    pub fn encode_turns(&self, messages: &[Message]) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = vec![self.bos];
        let mut system = String::new();
        for Message { role, content } in messages {
            let role = match role {
                Speaker::System if self.system_turn => "system",
                Speaker::System => {
                    system = format!("{content}\n\n");
                    continue;
                }
                Speaker::User => "user",
                Speaker::Assistant => "model",
            };
            ids.push(self.start_of_turn);
            ids.extend(self.encode(&format!("{role}\n{}{}", std::mem::take(&mut system), content.trim()))?);
            ids.push(self.end_of_turn);
            ids.extend(self.encode("\n")?);
        }
        ids.push(self.start_of_turn);
        ids.extend(self.encode("model\n")?);
        Ok(ids)
    }

    /// [`Tokenizer::encode_turns`] of one user's turn.
    pub fn encode_turn(&self, prompt: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_turns(&[Message { role: Speaker::User, content: prompt.to_owned() }])
    }

    /// A conversation as a checkpoint's chat template writes it. The names of control tokens that the template writes
    /// become those tokens, those that a message spells stay text.
    pub fn encode_chat(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
    ) -> Result<Vec<u32>, ChatTextError> {
        let said = |c: char| messages.iter().any(|message| message.content.contains(c));
        // Characters that Unicode keeps for such uses: no text has all of them.
        let guard = ('\u{fdd0}'..='\u{fdef}').find(|&c| !said(c)).unwrap_or('\u{fdd0}');
        let spelled = |text: &str| self.spelled(text).into_iter().map(str::to_owned).collect();
        let text = template.render(messages, guard, spelled)?;
        let mut ids = Vec::new();
        let encode = |ids: &mut Vec<u32>, text: &str| -> Result<(), TokenizerError> {
            if !text.is_empty() {
                ids.extend(self.encode(&text.replace(guard, ""))?);
            }
            Ok(())
        };
        let mut from = 0;
        for (range, id) in self.names_in(&text) {
            encode(&mut ids, &text[from..range.start])?;
            ids.push(id);
            from = range.end;
        }
        encode(&mut ids, &text[from..])?;
        Ok(ids)
    }

    /// The bytes of the text of `ids`: those of each token, control tokens and rows of the embedding without a token
    /// having none.
    pub fn bytes(&self, ids: &[u32]) -> Vec<u8> {
        let text = ids.iter().filter(|id| !self.control.contains(id));
        text.flat_map(|&id| {
            let name = self.name(id);
            byte(&name).map_or_else(|| name.replace(SPACE, " ").into_bytes(), |byte| vec![byte])
        })
        .collect()
    }

    /// The text of `ids`, without control tokens: [`Tokenizer::bytes`] with U+FFFD for what is no UTF-8.
    pub fn decode(&self, ids: &[u32]) -> String {
        String::from_utf8_lossy(&self.bytes(ids)).into_owned()
    }

    /// The name of a token in the vocabulary; empty for a row of the embedding that has none.
    pub fn name(&self, id: u32) -> String {
        self.inner.id_to_token(id).unwrap_or_default()
    }

    /// Whether both call the same tokens by the same ids, added ones included.
    pub fn has_tokens_of(&self, other: &Self) -> bool {
        self.inner.get_vocab(true) == other.inner.get_vocab(true)
    }

    /// The control or reserved token of that name.
    pub fn control(&self, name: &str) -> Option<u32> {
        self.no_text.get(name).copied()
    }

    /// The names of control and reserved tokens that `text` spells, each once, in the order of the text. It becomes none
    /// of them.
    pub fn spelled<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut found = Vec::new();
        for (range, _) in self.names_in(text) {
            let name = &text[range];
            if !found.contains(&name) {
                found.push(name);
            }
        }
        found
    }

    /// Where `text` spells control and reserved tokens, and which.
    fn names_in(&self, text: &str) -> impl Iterator<Item = (Range<usize>, u32)> {
        let longest = self.no_text.keys().map(String::len).max().unwrap_or(0);
        text.match_indices(['<', '[']).filter_map(move |(start, open)| {
            let close = if open == "<" { b'>' } else { b']' };
            let near = text.as_bytes()[start..].iter().take(longest);
            let end = near.enumerate().find_map(|(i, &b)| (b == close).then_some(start + i + 1))?;
            let id = self.no_text.get(&text[start..end])?;
            Some((start..end, *id))
        })
    }
}

/// The byte that a token such as `<0x0A>` stands for.
fn byte(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The part of a decoder, if any, under which a token's text depends on its neighbours or is not its name's.
fn foreign_decoder(decoder: &Value) -> Option<String> {
    let name = decoder.get("type")?.as_str()?;
    let parts = decoder.get("decoders").and_then(Value::as_array);
    match DECODERS.contains(&name) {
        false => Some(name.to_owned()),
        true => parts?.iter().find_map(foreign_decoder),
    }
}
