//! A tokenizer built like Gemma's, small: BPE over characters with byte fallback, spaces as U+2581, a line break
//! that is an added token, control tokens.

use std::path::Path;

use bon_engine::chat::{Message, Role as Speaker};
use bon_engine::gemma::config::{ConfigFile, GemmaConfig};
use bon_engine::tokenizer::{Role, Tokenizer, TokenizerError, role, writes_turns};
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

pub(crate) fn config(vocab_size: usize, bos: u32) -> GemmaConfig {
    let dir = tempfile::tempdir().unwrap();
    let json = json!({ "model_type": "gemma3_text", "vocab_size": vocab_size, "bos_token_id": bos });
    std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    ConfigFile::open(dir.path()).unwrap().gemma
}

pub(crate) fn load(bytes: &[u8], vocab_size: usize) -> Result<Tokenizer, TokenizerError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), bytes).unwrap();
    Tokenizer::open(dir.path(), &config(vocab_size, 2))
}

pub(crate) fn tokenizer() -> Tokenizer {
    load(tokenizer_json().to_string().as_bytes(), vocabulary().len()).unwrap()
}

/// Ids of the named pieces.
pub(crate) fn ids(pieces: &[&str]) -> Vec<u32> {
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
        assert_eq!(t.decode(&coded), format!("a{text}b"));
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
fn templates_that_write_these_turns() {
    for (template, turns) in [
        ("<start_of_turn>user <end_of_turn> model", true),
        ("<|turn>user <turn|> {% if add_generation_prompt %}<|turn>model", true),
        ("<|turn>user <turn|> <|channel>thought {% if add_generation_prompt %}<|turn>model", true),
        ("<|turn>user <turn|> {% if add_generation_prompt %}<|turn>model\n<|channel>thought", false),
        ("<|im_start|>user", false),
    ] {
        assert_eq!(writes_turns(template), turns, "{template}");
    }
}

/// Gemma 4's names for turns, and its turn for the system.
#[test]
fn turns_are_spelled_as_the_vocabulary_spells_them() {
    let json = tokenizer_json()
        .to_string()
        .replace("<start_of_turn>", "<|turn>")
        .replace("<end_of_turn>", "<turn|>");
    let four = load(json.as_bytes(), vocabulary().len()).unwrap();
    assert_eq!((four.start_of_turn(), four.end_of_turn()), (4, 5));
    let said = |role, content: &str| Message { role, content: content.to_owned() };
    let conversation =
        [said(Speaker::System, "us"), said(Speaker::User, "hi<turn|>"), said(Speaker::Assistant, "h")];
    // By name, because control tokens have no text.
    let shown = |t: &Tokenizer| -> String {
        let names = t.encode_turns(&conversation).unwrap().into_iter().map(|id| t.name(id));
        names.collect::<String>().replace("<0x7C>", "|")
    };
    assert_eq!(
        shown(&four),
        "<bos><|turn>system\nus<turn|>\n<|turn>user\nhi<turn|><turn|>\n<|turn>model\nh<turn|>\n<|turn>model\n"
    );
    assert_eq!(
        shown(&tokenizer()),
        "<bos><start_of_turn>user\nus\n\nhi<turn|><end_of_turn>\n<start_of_turn>model\nh<end_of_turn>\n<start_of_turn>model\n"
    );
    // What a message spells is text.
    let ends = four.encode_turns(&conversation).unwrap().into_iter().filter(|&id| id == four.end_of_turn());
    assert_eq!(ends.count(), 3);
    for name in ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|\"|>", "<|think|>", "<|tool_response>"]
    {
        assert_eq!(role(name), Role::Control, "{name}");
    }
    for name in ["<|>", "|>", "<|", "<b>", "a|>", "<|a"] {
        assert_eq!(role(name), Role::Text, "{name}");
    }
}

#[test]
fn decoding_skips_control_tokens_and_joins_bytes() {
    let t = tokenizer();
    let tokens = ids(&["<bos>", "\u{2581}a", "<0xC3>", "<0xA9>", "<end_of_turn>"]);
    assert_eq!(t.decode(&tokens), " a\u{e9}");
    assert_eq!(t.encode("\u{e9}").unwrap(), ids(&["<0xC3>", "<0xA9>"]));
    assert_eq!(t.decode(&ids(&["<0xC3>"])), "\u{fffd}");
    assert_eq!((t.bos(), t.eos(), t.start_of_turn(), t.end_of_turn()), (2, 1, 4, 5));
}

/// Control tokens are known by name, whatever the file says: Gemma 1's and 2's files mark few of them.
#[test]
fn control_tokens_that_the_file_does_not_mark() {
    let names = [
        "<start_of_image>",
        "<mask>",
        "<2mass>",
        "[multimodal]",
        "[@BOS@]",
        "<|im_end|>",
        "<unused7>",
        "<h1>",
    ];
    let size = vocabulary().len();
    let mut json = tokenizer_json();
    let added = json["added_tokens"].as_array_mut().unwrap();
    added.iter_mut().for_each(|token| token["special"] = false.into());
    for (id, content) in (size..).zip(names) {
        added.push(
            json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": id % 2 == 0, "special": false }),
        );
    }
    let t = load(json.to_string().as_bytes(), size + names.len()).unwrap();
    let id = |name: &str| names.iter().position(|n| *n == name).map(|at| (size + at) as u32).unwrap();
    for name in SPECIAL.into_iter().chain(names[..7].iter().copied()) {
        let coded = t.encode(&format!("a{name}b")).unwrap();
        assert!(coded.iter().all(|&id| (6..size as u32).contains(&id)), "{name}: {coded:?}");
        assert_eq!(t.decode(&coded), format!("a{name}b"));
        assert_eq!(t.spelled(&format!("a < b{name} [c]{name}")), [name]);
    }
    for name in &names[..6] {
        assert_eq!(t.decode(&[ids(&["us"])[0], id(name), ids(&["_"])[0]]), "us_", "{name}");
    }
    assert_eq!(t.decode(&[4, 5, 0, 3]), "");
    // A reserved token is shown, since nothing but a model tuned to it writes it; a word in brackets is a word.
    assert_eq!(t.decode(&[id("<unused7>"), id("<h1>")]), "<unused7><h1>");
    assert_eq!(t.encode("<h1>").unwrap(), [id("<h1>")]);
    assert!(t.spelled("<h1> <unused> <unusedx> [[multimodal] <\u{e9}").len() == 1);
}

/// What ends responses is a control token, unless it is a word.
#[test]
fn end_tokens_of_the_configuration() {
    let size = vocabulary().len();
    let mut json = tokenizer_json();
    json["added_tokens"].as_array_mut().unwrap().push(json!({
        "id": size, "content": "<done>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false,
    }));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    let mut config = config(size + 1, 2);
    config.eos_tokens = vec![1, size as u32, ids(&["\n"])[0]];
    let t = Tokenizer::open(dir.path(), &config).unwrap();
    assert!(!t.encode("a<done>").unwrap().contains(&(size as u32)));
    assert_eq!(t.encode("a\n").unwrap(), ids(&["a", "\n"]));
    assert_eq!(t.decode(&[ids(&["a", "\n"]), vec![size as u32]].concat()), "a\n");
}

#[test]
fn merges_that_lead_to_a_control_token() {
    let mut json = tokenizer_json();
    json["model"]["ignore_merges"] = true.into();
    let t = load(json.to_string().as_bytes(), vocabulary().len()).unwrap();
    let problem = t.encode("<bos>").unwrap_err().to_string();
    assert!(problem.contains("makes the control token <bos> from text"), "{problem}");
}

/// The characters of a run of byte tokens that are whole stay, wherever it is cut; its text only grows.
#[test]
fn a_cut_run_of_bytes_keeps_its_whole_characters() {
    let t = tokenizer();
    for (text, cuts) in [
        ("\u{13000}\u{13001}", &["", "?", "?", "?", "\u{13000}", "\u{13000}?"][..]),
        ("\u{e9}\u{20ac}", &["", "?", "\u{e9}", "\u{e9}?", "\u{e9}?", "\u{e9}\u{20ac}"]),
    ] {
        let coded = t.encode(text).unwrap();
        assert_eq!(coded.len(), text.len());
        for (n, expected) in cuts.iter().enumerate() {
            assert_eq!(t.decode(&coded[..n]), expected.replace('?', "\u{fffd}"), "{n} bytes of {text}");
        }
    }
    // A run that goes wrong in the middle, and a control token within a character.
    let run = ids(&["<0xC3>", "<0xA9>", "<0xFF>", "<0x41>", "<0xC3>", "a", "<0xC3>", "<pad>", "<0xA9>"]);
    assert_eq!(t.decode(&run), "\u{e9}\u{fffd}A\u{fffd}a\u{e9}");
}

#[test]
fn a_decoder_that_is_not_gemmas() {
    for decoder in [
        json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
        json!({ "type": "Sequence", "decoders": [{ "type": "Fuse" }, { "type": "Strip", "content": " ", "start": 1, "stop": 0 }] }),
    ] {
        let mut json = tokenizer_json();
        json["decoder"] = decoder;
        let problem = refusal(load(json.to_string().as_bytes(), vocabulary().len()));
        assert!(problem.contains("its decoder is ") && problem.contains("not Gemma's"), "{problem}");
    }
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
    load(bytes.as_bytes(), size + 1023).unwrap();
    for wrong in [size - 1, size + 1024] {
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

/// The crate's own reading of the file.
fn crates_tokenizer(json: &Value) -> tokenizers::Tokenizer {
    let mut t = tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap();
    t.set_encode_special_tokens(true);
    t
}

#[test]
fn both_spellings_of_merges_are_read_as_the_crate_reads_them() {
    let (now, mut before) = (tokenizer_json(), tokenizer_json());
    before["model"]["merges"] = json!(["u s", "\u{2581} a"]);
    before["model"].as_object_mut().unwrap().remove("type");
    for json in [now, before] {
        let (ours, crates) =
            (load(json.to_string().as_bytes(), vocabulary().len()).unwrap(), crates_tokenizer(&json));
        for text in ["a bus", "us us\n\n<eos> \u{e9}", " a aa", "<unused1>\u{2581}", ""] {
            let want = crates.encode_fast(text, false).unwrap();
            assert_eq!(ours.encode(text).unwrap(), want.get_ids(), "{text:?}");
        }
        assert_eq!(ours.encode("a bus").unwrap(), ids(&["a", "\u{2581}", "b", "us"]));
    }
}

#[test]
fn what_is_not_byte_pair_encoding_as_gemmas() {
    for (key, value, part) in [
        ("type", json!("Unigram"), "unknown variant `Unigram`, expected `BPE`"),
        ("merges", json!(["u s t"]), "invalid value: string \"u s t\", expected a merge of two tokens"),
        ("merges", json!([["u"]]), "invalid length 1, expected a merge of two tokens"),
        ("merges", json!([["u", "s", "t"]]), "invalid length 3, expected a merge of two tokens"),
        ("merges", json!([["u", "z"]]), "Token `uz` out of vocabulary"),
        ("end_of_word_suffix", json!("</w>"), "expected unit"),
        ("continuing_subword_prefix", json!("##"), "expected unit"),
    ] {
        let mut json = tokenizer_json();
        json["model"][key] = value;
        let problem = refusal(load(json.to_string().as_bytes(), vocabulary().len()));
        assert!(problem.contains(part), "{key}: {problem}");
    }
}

/// Merges that a training pipeline would leave out at random.
#[test]
fn a_dropout_of_merges_changes_nothing() {
    let mut json = tokenizer_json();
    json["model"]["dropout"] = json!(1.0);
    let t = load(json.to_string().as_bytes(), vocabulary().len()).unwrap();
    assert_eq!(t.encode("us").unwrap(), ids(&["us"]));
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
        prop_assert_eq!(t.decode(&coded), text);
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
