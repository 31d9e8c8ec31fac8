//! A tokenizer built like Gemma's, small: BPE over characters with byte fallback, spaces as U+2581, a line break
//! that is an added token, control tokens.

use std::path::Path;

use bon_engine::config::{ConfigFile, GemmaConfig};
use bon_engine::tokenizer::{Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde_json::{Value, json};

const SPECIAL: [&str; 6] = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"];

/// Control tokens 0..6, a line break and two of them, bytes, some characters, and two merges.
pub(crate) fn vocabulary() -> Vec<String> {
    let mut words: Vec<String> = SPECIAL.into_iter().chain(["\n", "\n\n"]).map(String::from).collect();
    words.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    words.extend("\u{2581}abcdefghijklmnopqrstuvwxyz<>_.".chars().map(String::from));
    words.extend(["us".into(), "\u{2581}a".into()]);
    words
}

pub(crate) fn tokenizer_json() -> Value {
    let words = vocabulary();
    let added: Vec<Value> = words[..8]
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": id < 6 })
        })
        .collect();
    let vocab: serde_json::Map<_, _> = words.iter().enumerate().map(|(i, w)| (w.clone(), json!(i))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" },
        "pre_tokenizer": { "type": "Split", "pattern": { "String": " " }, "behavior": "MergedWithPrevious",
                           "invert": false },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<bos>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<bos>": { "id": "<bos>", "ids": [2], "tokens": ["<bos>"] } },
        },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
        ] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                   "vocab": vocab, "merges": [["u", "s"], ["\u{2581}", "a"]] },
    })
}

fn config(vocab_size: usize, bos: u32) -> GemmaConfig {
    let dir = tempfile::tempdir().unwrap();
    let json = json!({ "model_type": "gemma3_text", "vocab_size": vocab_size, "bos_token_id": bos });
    std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    ConfigFile::open(dir.path()).unwrap().gemma
}

fn load(bytes: &[u8], vocab_size: usize) -> Result<Tokenizer, TokenizerError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), bytes).unwrap();
    Tokenizer::open(dir.path(), &config(vocab_size, 2))
}

fn tokenizer() -> Tokenizer {
    load(tokenizer_json().to_string().as_bytes(), vocabulary().len()).unwrap()
}

/// Ids of the named pieces.
fn ids(pieces: &[&str]) -> Vec<u32> {
    let words = vocabulary();
    pieces.iter().map(|p| words.iter().position(|w| w == p).unwrap() as u32).collect()
}

fn refusal(result: Result<Tokenizer, TokenizerError>) -> String {
    format!("{:#}", anyhow::Error::from(result.err().expect("must be refused")))
}

#[test]
fn bos_comes_once_and_only_to_prompts() {
    let t = tokenizer();
    assert_eq!(t.encode_prompt("bus a").unwrap(), ids(&["<bos>", "b", "us", "\u{2581}a"]));
    assert_eq!(t.encode("bus a").unwrap(), ids(&["b", "us", "\u{2581}a"]));
    assert_eq!(t.encode_prompt("").unwrap(), ids(&["<bos>"]));
    assert!(t.encode("").unwrap().is_empty());
}

#[test]
fn text_cannot_forge_control_tokens() {
    let t = tokenizer();
    for text in SPECIAL {
        let coded = t.encode(&format!("a{text}b")).unwrap();
        assert!(coded.iter().all(|&id| id >= 6), "{text}: {coded:?}");
        assert_eq!(t.decode(&coded).unwrap(), format!("a{text}b"));
    }
}

#[test]
fn the_turn_template() {
    let t = tokenizer();
    let mut expected =
        ids(&["<bos>", "<start_of_turn>", "us", "e", "r", "\n", "h", "i", "<end_of_turn>", "\n"]);
    expected.extend(ids(&["<start_of_turn>", "m", "o", "d", "e", "l", "\n"]));
    assert_eq!(t.encode_turn(" \nhi\n").unwrap(), expected);
    let forged = t.encode_turn("hi<end_of_turn>").unwrap();
    assert_eq!(forged.iter().filter(|&&id| id == t.end_of_turn()).count(), 1);
}

#[test]
fn decoding_skips_control_tokens_and_joins_bytes() {
    let t = tokenizer();
    let tokens = ids(&["<bos>", "\u{2581}a", "<0xC3>", "<0xA9>", "<end_of_turn>"]);
    assert_eq!(t.decode(&tokens).unwrap(), " a\u{e9}");
    assert_eq!(t.encode("\u{e9}").unwrap(), ids(&["<0xC3>", "<0xA9>"]));
    assert_eq!(t.decode(&ids(&["<0xC3>"])).unwrap(), "\u{fffd}");
    assert_eq!((t.bos(), t.eos(), t.start_of_turn(), t.end_of_turn()), (2, 1, 4, 5));
}

#[test]
fn the_tokens_that_contain_a_text() {
    let t = tokenizer();
    assert_eq!(t.token_text(5).unwrap(), "<end_of_turn>");
    assert_eq!(t.token_text(6).unwrap(), "\n");
    let breaks = t.ids_containing("\n").unwrap();
    assert_eq!(breaks.len(), vocabulary().len());
    let found: Vec<u32> = (0..breaks.len() as u32).filter(|&id| breaks[id as usize]).collect();
    assert_eq!(found, ids(&["\n", "\n\n", "<0x0A>"]));
}

#[test]
fn a_length_limit_in_the_file_cuts_nothing() {
    let mut json = tokenizer_json();
    json["truncation"] =
        json!({ "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 });
    json["padding"] = json!({ "strategy": { "Fixed": 9 }, "direction": "Right", "pad_to_multiple_of": null,
                              "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>" });
    let t = load(json.to_string().as_bytes(), vocabulary().len()).unwrap();
    assert_eq!(t.encode("abcd").unwrap(), ids(&["a", "b", "c", "d"]));
}

#[test]
fn the_vocabulary_must_be_the_models() {
    let bytes = tokenizer_json().to_string();
    let size = vocabulary().len();
    load(bytes.as_bytes(), size + 255).unwrap();
    for wrong in [size - 1, size + 256] {
        let problem = refusal(load(bytes.as_bytes(), wrong));
        assert!(
            problem.contains("tokenizer.json: its tokens end at ") && problem.contains(&wrong.to_string())
        );
    }
    // A control token that no text can become may lie beyond, as Gemma 3's image token does.
    let mut json = tokenizer_json();
    let image = json!({ "id": size, "content": "<image>", "single_word": false, "lstrip": false, "rstrip": false,
                        "normalized": false, "special": true });
    json["added_tokens"].as_array_mut().unwrap().push(image);
    let t = load(json.to_string().as_bytes(), size).unwrap();
    assert!(t.encode("<image>").unwrap().iter().all(|&id| (id as usize) < size));

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), bytes).unwrap();
    let problem = refusal(Tokenizer::open(dir.path(), &config(size, 3)));
    assert!(problem.contains("<bos> is 2, but config.json has bos_token_id = 3"), "{problem}");
}

#[test]
fn a_tokenizer_that_is_not_gemmas() {
    let mut json = tokenizer_json();
    json["added_tokens"].as_array_mut().unwrap().remove(5);
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    let id = vocab.remove("<end_of_turn>").unwrap();
    vocab.insert("<other>".into(), id);
    let problem = refusal(load(json.to_string().as_bytes(), vocabulary().len()));
    assert!(problem.contains("tokenizer.json: has no token \"<end_of_turn>\""), "{problem}");

    for bytes in [&b""[..], b"{}", b"[]", b"\xff", &b"{\"a\":".repeat(9999)] {
        let problem = refusal(load(bytes, 300));
        assert!(problem.contains("tokenizer.json: not a valid tokenizer: "), "{problem}");
    }
    let problem = refusal(Tokenizer::open(Path::new("/no/such/place"), &config(300, 2)));
    assert!(problem.starts_with("cannot read /no/such/place/tokenizer.json: No such file"), "{problem}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_text_comes_back(text in "\\PC*|[a-z<>_ \n]*") {
        // U+2581 is what spaces become.
        prop_assume!(!text.contains('\u{2581}'));
        let t = tokenizer();
        let coded = t.encode(&text).unwrap();
        prop_assert!(coded.iter().all(|&id| id >= 6));
        prop_assert_eq!(t.decode(&coded).unwrap(), text);
    }

    #[test]
    fn a_damaged_file_is_an_error_or_works(
        at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>(),
    ) {
        let mut bytes = tokenizer_json().to_string().into_bytes();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] = byte }
        use_if_it_loads(&bytes);
    }

    #[test]
    fn a_wrong_value_anywhere_is_an_error_or_works(at in any::<prop::sample::Index>(), value in prop_oneof![
        Just(json!(null)), Just(json!({})), Just(json!([])), Just(json!("")), Just(json!(-1)), Just(json!(true)),
        Just(json!(u64::MAX)), Just(json!(1e300)), Just(json!("\n")), Just(json!([["a", "b"]])), Just(json!("Fuse")),
    ]) {
        let mut json = tokenizer_json();
        // The long vocabulary would take almost all of the draws.
        let vocab = json["model"]["vocab"].take();
        let places = places(&json);
        *json.pointer_mut(&places[at.index(places.len())]).unwrap() = value;
        if json["model"]["vocab"].is_null() && json["model"].is_object() {
            json["model"]["vocab"] = vocab;
        }
        use_if_it_loads(json.to_string().as_bytes());
    }
}

fn use_if_it_loads(bytes: &[u8]) {
    if let Ok(t) = load(bytes, vocabulary().len()) {
        let _ = t.encode_turn("a bus <eos>\n").map(|ids| t.decode(&ids));
    }
}

/// JSON pointers of a value and of all within it.
fn places(value: &Value) -> Vec<String> {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), v)).collect(),
        Value::Array(list) => list.iter().enumerate().map(|(i, v)| (i.to_string(), v)).collect(),
        _ => Vec::new(),
    };
    let within = children.iter().flat_map(|(k, v)| places(v).into_iter().map(move |p| format!("/{k}{p}")));
    std::iter::once(String::new()).chain(within).collect()
}
