//! Text <-> token ids: a thin layer over the `tokenizers` crate, and Gemma's turn template.
//!
//! Text never becomes a control token: `<end_of_turn>` in a prompt is encoded as the characters it is made of,
//! where Transformers would end the turn. A data set or a user can so not forge a turn, and a control token in a
//! sequence always means that the engine put it there.

use std::path::{Path, PathBuf};

use crate::checkpoint::{FileError, read_file};
use crate::config::GemmaConfig;

/// The tokenizer, in a Hugging Face directory.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Gemma's have up to 34 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Rows by which an embedding may exceed the tokenizer's vocabulary: Gemma 3's are padded to a multiple of 64.
const MAX_SPARE_ROWS: usize = 255;

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
    /// A text that the tokenizer cannot encode, or ids that it cannot decode.
    #[error("the tokenizer failed on this text")]
    Text(#[source] tokenizers::Error),
}

/// Gemma's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
    bos: u32,
    eos: u32,
    start_of_turn: u32,
    end_of_turn: u32,
}

/// The parts of tokenizer.json on which the `tokenizers` crate panics unless they are as Gemma's: checked first.
#[derive(serde::Deserialize)]
struct Probe {
    /// Any JSON value.
    #[serde(rename = "decoder", default)]
    _decoder: serde_json::Value,
    #[serde(rename = "model")]
    _model: ProbeModel,
}

#[derive(serde::Deserialize)]
struct ProbeModel {
    /// Null.
    #[serde(rename = "continuing_subword_prefix", default)]
    _prefix: (),
}

impl Tokenizer {
    /// Loads `tokenizer.json` and checks it against the model's vocabulary and BOS token.
    pub fn open(dir: &Path, config: &GemmaConfig) -> Result<Self, TokenizerError> {
        let path = dir.join(TOKENIZER_FILE);
        let bytes = read_file(&path, MAX_TOKENIZER_BYTES)?;
        let format = |source| TokenizerError::Format { path: path.clone(), source };
        serde_json::from_slice::<Probe>(&bytes).map_err(|e| format(e.into()))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(format)?;
        inner.with_truncation(None).map_err(format)?.with_padding(None).set_encode_special_tokens(true);

        let id = |token| {
            inner.token_to_id(token).ok_or_else(|| TokenizerError::NoToken { path: path.clone(), token })
        };
        let (bos, eos) = (id("<bos>")?, id("<eos>")?);
        let (start_of_turn, end_of_turn) = (id("<start_of_turn>")?, id("<end_of_turn>")?);

        let other_model = |problem| Err(TokenizerError::OtherModel { path: path.clone(), problem });
        let vocab_size = config.vocab_size;
        // A control token may lie beyond the embedding, since text never becomes one: Gemma 3's text models have
        // the token of an image there.
        let added = inner.get_added_tokens_decoder();
        let ordinary = |id: &u32| added.get(id).is_none_or(|token| !token.special);
        let largest = inner.get_vocab(true).into_values().filter(ordinary).max().map_or(0, |id| id as usize);
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
        Ok(Self { inner, vocab_size, bos, eos, start_of_turn, end_of_turn })
    }

    /// `<bos>`, with which every sequence begins.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// `<eos>`.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// `<start_of_turn>`.
    pub fn start_of_turn(&self) -> u32 {
        self.start_of_turn
    }

    /// `<end_of_turn>`.
    pub fn end_of_turn(&self) -> u32 {
        self.end_of_turn
    }

    /// The tokens of `text` alone: what follows a prompt, for instance an expert's response.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, false).map_err(TokenizerError::Text)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// BOS and `text`: a prompt to be continued.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        Ok([vec![self.bos], self.encode(text)?].concat())
    }

    /// BOS and one user turn, up to where the model's turn begins:
    /// `<bos><start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n`. Space around the prompt is
    /// trimmed, as by Gemma's chat template.
    pub fn encode_turn(&self, prompt: &str) -> Result<Vec<u32>, TokenizerError> {
        let user = self.encode(&format!("user\n{}", prompt.trim()))?;
        let (between, model) = (self.encode("\n")?, self.encode("model\n")?);
        let (start, end) = (vec![self.start_of_turn], vec![self.end_of_turn]);
        Ok([vec![self.bos], start.clone(), user, end, between, start, model].concat())
    }

    /// The text of `ids`, without control tokens. Bytes that are no UTF-8 come out as U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(ids, true).map_err(TokenizerError::Text)
    }

    /// The text of one token, control tokens included; empty for a row of the embedding that has none.
    pub fn token_text(&self, id: u32) -> Result<String, TokenizerError> {
        self.inner.decode(&[id], false).map_err(TokenizerError::Text)
    }

    /// For every token id of the model whether the token's own text contains `needle`. A text can also come to
    /// contain it across two tokens.
    pub fn ids_containing(&self, needle: &str) -> Result<Vec<bool>, TokenizerError> {
        (0..self.vocab_size as u32).map(|id| Ok(self.token_text(id)?.contains(needle))).collect()
    }
}
