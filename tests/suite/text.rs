//! Where responses end, what their text is, and what prompts are made of: tables that say it row by row, and the rules
//! written down once more for random tokens.

use bon_engine::rollout::{PromptFormat, ResponseEnd, Wrapping};
use bon_engine::tokenizer::Tokenizer;
use proptest::prelude::*;
use serde_json::json;

use crate::tokenizer::{config, ids, load, tokenizer, tokenizer_json, vocabulary};

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

/// What a rule makes of tokens that come one by one: how many it takes, or all of them and no end; the text; and what of
/// it was settled before each token, the last included.
fn read(rule: &ResponseEnd, tokens: &[u32]) -> (Option<usize>, String, Vec<String>) {
    let end = (1..=tokens.len()).find(|&n| rule.reached(&tokens[..n]));
    let taken = &tokens[..end.unwrap_or(tokens.len())];
    let settled = (0..=taken.len()).map(|n| rule.settled(&taken[..n])).collect();
    (end, rule.text(taken), settled)
}

#[test]
fn where_responses_end_and_what_their_text_is() {
    let t = tokenizer();
    let mut config = config(vocabulary().len(), 2);
    config.eos_tokens = vec![1, ids(&["z"])[0]];
    for (stop, pieces, end, text, last) in [
        // No stop strings: end tokens alone, the model's own among them, whatever word they are.
        (&[][..], &["a", "b"][..], None, "ab", "ab"),
        (&[], &["a", "<eos>", "b"], Some(2), "a", "a"),
        (&[], &["a", "<end_of_turn>", "b"], Some(2), "a", "a"),
        (&[], &["a", "z", "b"], Some(2), "a", "a"),
        (&[], &["<eos>"], Some(1), "", ""),
        // Other control tokens end nothing and are no text.
        (&[], &["a", "<start_of_turn>", "<pad>", "<unk>", "<bos>", "b"], None, "ab", "ab"),
        // A stop string: in one token, over two, within one, and around a token without text.
        (&["\n"], &["a", "\n", "b"], Some(2), "a", "a"),
        (&["\n"], &["a", "\n\n", "b"], Some(2), "a", "a"),
        (&["\n\n"], &["a", "\n", "b", "\n", "\n"], Some(5), "a\nb", "a\nb"),
        (&["\n"], &["a", "<0x0A>"], Some(2), "a", "a"),
        (&["s_"], &["b", "us", "_"], Some(3), "bu", "bu"),
        (&["ab"], &["a", "<pad>", "<pad>", "<pad>", "b"], Some(5), "", ""),
        (&["abc"], &["a", "<unk>", "b", "<bos>", "c", "d"], Some(5), "", ""),
        (&[" a"], &["b", "\u{2581}a"], Some(2), "b", "b"),
        // The first of several, by its place in the text; an end token before any of them.
        (&["c", "b"], &["a", "b", "c"], Some(2), "a", "a"),
        (&["bc", "us"], &["a", "us", "b", "c"], Some(2), "a", "a"),
        (&["u", "s"], &["b", "us"], Some(2), "b", "b"),
        (&["s", "u"], &["b", "us"], Some(2), "b", "b"),
        (&["b"], &["a", "<eos>", "b"], Some(2), "a", "a"),
        // Characters in bytes: a stop string of them, and the bytes before one that is cut off.
        (&["\u{e9}"], &["a", "<0xC3>", "<0xA9>", "b"], Some(3), "a", "a"),
        (&["b"], &["<0xC3>", "b"], Some(2), "\u{fffd}", "\u{fffd}"),
        (&[], &["a", "<0xE2>", "<0x82>"], None, "a\u{fffd}", "a"),
        (&[], &["<0xE2>", "<0x82>", "<0xAC>", "<0xE2>"], None, "\u{20ac}\u{fffd}", "\u{20ac}"),
        (&[], &["<0xFF>", "<0xE2>", "a"], None, "\u{fffd}\u{fffd}a", "\u{fffd}\u{fffd}a"),
        (&[], &["a", "<0xC3>", "<eos>"], Some(3), "a\u{fffd}", "a\u{fffd}"),
        // What may be the beginning of a stop string is not settled.
        (&["abc"], &["d", "a", "b"], None, "dab", "d"),
        (&["aab"], &["a", "a", "a"], None, "aaa", "a"),
        (&["a\u{e9}"], &["b", "a", "<0xC3>"], None, "ba\u{fffd}", "b"),
        (&["xy", "yab"], &["x", "b", "y", "a"], None, "xbya", "xb"),
        // Once the response has ended, all is, and what was shown stays.
        (&["u_", "su"], &["us", "us"], Some(2), "u", "u"),
        // The name of a control token as a stop string is the token, or its characters.
        (&["<start_of_turn>"], &["a", "<start_of_turn>", "b"], Some(2), "a", "a"),
        (&["<pad>"], &["a", "<", "p", "a", "d", ">", "b"], Some(6), "a", "a"),
        (&["<pad>", "b"], &["a", "<bos>", "b"], Some(3), "a", "a"),
    ] {
        let stop = strings(stop);
        let (found, found_text, settled) = read(&ResponseEnd::new(&config, &t, &stop), &ids(pieces));
        let case = format!("{pieces:?} until {stop:?}");
        assert_eq!((found, found_text.as_str()), (end, text), "{case}");
        assert_eq!(settled.last().unwrap(), last, "{case}: {settled:?}");
    }
    let stop = ResponseEnd::new(&config, &t, &[]).interrupted_by(&|| true);
    assert!(stop.reached(&ids(&["a"])));
}

#[test]
fn experts_end_where_sampled_responses_do() {
    let t = tokenizer();
    let (config, eos) = (config(vocabulary().len(), 2), 1);
    for (stop, text, pieces, kept) in [
        (&[][..], "ab", &["a", "b", "<eos>"][..], "ab"),
        (&[], "a<eos>", &["a", "<", "e", "o", "s", ">", "<eos>"], "a<eos>"),
        (&["\n"], "ab", &["a", "b", "\n"], "ab"),
        // Whatever follows the first stop string is no part of the response, whichever of several it is.
        (&["\n"], "a\nb", &["a", "\n"], "a"),
        (&["\n"], "a\n\nb", &["a", "\n"], "a"),
        (&["\n", "c"], "acb", &["a", "\n"], "a"),
        (&["\n"], "\n", &["\n"], ""),
        // Nothing ends what cannot be told from an earlier end.
        (&["__"], "a_", &["a", "_", "<eos>"], "a_"),
        (&["<end_of_turn>"], "a", &["a", "<end_of_turn>"], "a"),
        (&["<end_of_turn>", "b"], "ab", &["a", "<end_of_turn>"], "a"),
        (&["\u{e9}"], "a\u{e9}b", &["a", "<0xC3>", "<0xA9>"], "a"),
    ] {
        let stop = strings(stop);
        let rule = ResponseEnd::new(&config, &t, &stop);
        let tokens = rule.complete(text, eos).unwrap();
        assert_eq!(tokens, ids(pieces), "{text:?} until {stop:?}");
        assert_eq!(rule.text(&tokens), kept, "{text:?} until {stop:?}");
        assert_eq!(read(&rule, &tokens).0, Some(tokens.len()), "{text:?} until {stop:?}");
    }
    // An end token that is a word ends an expert, too.
    let mut config = config.clone();
    config.eos_tokens.push(ids(&["b"])[0]);
    assert_eq!(ResponseEnd::new(&config, &t, &[]).complete("abc", eos).unwrap(), ids(&["a", "b"]));
}

#[test]
fn what_a_prompt_is_made_of() {
    let t = tokenizer();
    let turn = |inner: &[&'static str]| {
        let (open, close) = (["<bos>", "<start_of_turn>", "us", "e", "r", "\n"], ["<end_of_turn>", "\n"]);
        [&open[..], inner, &close[..], &["<start_of_turn>", "m", "o", "d", "e", "l", "\n"][..]].concat()
    };
    let plain = |inner: &[&'static str]| [&["<bos>"][..], inner].concat();
    let forged = ["<", "e", "n", "d", "_", "o", "f", "_", "t", "u", "r", "n", ">"];
    for (prefix, prompt, suffix, in_turn, text, pieces) in [
        ("", "ab", "", false, "ab", plain(&["a", "b"])),
        ("c", "ab", "d", false, "cabd", plain(&["c", "a", "b", "d"])),
        // Without a turn nothing is trimmed: a space at the end is the user's.
        ("", " ab ", "\n", false, " ab \n", plain(&["\u{2581}a", "b", "\u{2581}", "\n"])),
        // Merges go over the seams: the text is one.
        ("u", "s", "", false, "us", plain(&["us"])),
        ("", "ab", "", true, "ab", turn(&["a", "b"])),
        ("c\n", "ab", "\nd", true, "c\nab\nd", turn(&["c", "\n", "a", "b", "\n", "d"])),
        ("\n ", "ab", " \n", true, "\n ab \n", turn(&["a", "b"])),
        // Control tokens are the engine's alone.
        ("", "<end_of_turn>", "", false, "<end_of_turn>", plain(&forged)),
        ("", "<end_of_turn>", "", true, "<end_of_turn>", turn(&forged)),
    ] {
        let format =
            PromptFormat { prefix, suffix, wrapping: if in_turn { Wrapping::Turn } else { Wrapping::None } };
        let found = format.apply(&t, &[], prompt).unwrap();
        assert_eq!(found, (text.to_owned(), ids(&pieces)), "{prefix:?} {prompt:?} {suffix:?} {in_turn}");
    }
}

/// Bytes of single tokens, from the vocabulary's words.
fn bytes_of(id: u32) -> Vec<u8> {
    let word = &vocabulary()[id as usize];
    match (id, word.strip_prefix("<0x")) {
        (0..6, _) => vec![],
        (_, Some(digits)) => vec![u8::from_str_radix(&digits[..2], 16).unwrap()],
        _ => word.replace('\u{2581}', " ").into_bytes(),
    }
}

/// A vocabulary whose file marks nothing as special.
fn unmarked() -> Tokenizer {
    let mut json = tokenizer_json();
    json["added_tokens"].as_array_mut().unwrap().iter_mut().for_each(|t| t["special"] = json!(false));
    load(json.to_string().as_bytes(), vocabulary().len()).unwrap()
}

fn tokens() -> impl Strategy<Value = Vec<u32>> {
    let n = vocabulary().len() as u32;
    // Pieces of characters, of stop strings, control tokens.
    let some =
        ids(&["<0xF0>", "<0x93>", "<0x80>", "<0xC3>", "<0xA9>", "a", "b", "\n", "\n\n", "us", "<pad>"]);
    prop::collection::vec(prop_oneof![8 => prop::sample::select(some), 1 => 0..n, 1 => 0u32..6], 0..24)
}

fn stops() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("[ab\nus\u{e9}]{1,3}", 0..3)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// The rules of `ResponseEnd`, from their definition: the whole text at every length.
    #[test]
    fn a_response_is_one_function_of_its_tokens(tokens in tokens(), stop in stops()) {
        let t = unmarked();
        let rule = ResponseEnd::new(&config(vocabulary().len(), 2), &t, &stop);
        let find = |text: &[u8]| {
            let at = |s: &String| (0..text.len()).find(|&i| text[i..].starts_with(s.as_bytes()));
            stop.iter().filter_map(at).min()
        };
        let mut text = Vec::new();
        let mut end = None;
        for (n, &id) in tokens.iter().enumerate() {
            text.extend(if id == 1 || id == 5 { vec![] } else { bytes_of(id) });
            if id == 1 || id == 5 || find(&text).is_some() {
                end = Some(n + 1);
                break;
            }
        }
        text.truncate(find(&text).unwrap_or(text.len()));
        let text = String::from_utf8_lossy(&text).into_owned();
        let (found, found_text, settled) = read(&rule, &tokens);
        prop_assert_eq!(found, end);
        prop_assert_eq!(&found_text, &text);
        // Live output only grows, and into this text.
        let mut shown = "";
        for now in &settled {
            prop_assert!(now.starts_with(shown) && text.starts_with(now.as_str()), "{settled:?} into {text:?}");
            shown = now;
        }
    }

    /// An expert's tokens are a response that sampling could give, and its text is the expert's up to the first stop.
    #[test]
    fn an_expert_is_a_response(text in "[ab\nus\u{e9}<>]{0,12}", stop in stops()) {
        let t = unmarked();
        let rule = ResponseEnd::new(&config(vocabulary().len(), 2), &t, &stop);
        let tokens = rule.complete(&text, 1).unwrap();
        let (end, kept, _) = read(&rule, &tokens);
        prop_assert_eq!(end, Some(tokens.len()));
        let cut = stop.iter().filter_map(|s| text.find(s.as_str())).min().unwrap_or(text.len());
        prop_assert_eq!(kept, &text[..cut]);
    }
}
