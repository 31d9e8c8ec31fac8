//! Pages in a real browser: plots have a size, labels do not overlap, nothing is wider than the screen, text has contrast in
//! light and dark, and nothing that a model wrote runs. It needs a Chromium (`tools/find-browser.sh`), so `make browser`
//! runs it, and `make test` where there is one.
//!
//! The pages themselves have no script: a page of the test's own holds them in a frame, measures, and writes what it finds
//! into its own text. Pages and screenshots stay in `target/tmp/pages`, to be looked at.

#[path = "suite/sources.rs"]
mod sources;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bon_engine::page::page;
use serde_json::Value;

/// Widths of a phone, a tablet and a desktop.
const WIDTHS: [u32; 3] = [360, 800, 1280];

/// Measures `frame`'s document at a width: `problems` are sentences.
const MEASURE: &str = r#"
const contrast = (a, b) => {
  const channel = c => c <= 0.04045 ? c / 12.92 : Math.pow((c + 0.055) / 1.055, 2.4);
  const luminance = c => { const [r, g, b] = c.map(x => channel(x / 255)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const [x, y] = [luminance(a) + 0.05, luminance(b) + 0.05];
  return Math.max(x, y) / Math.min(x, y);
};
const colour = text => (text.match(/[\d.]+/g) || []).map(Number);
const opaque = c => c.length === 3 || (c.length === 4 && c[3] === 1);
const behind = (view, node) => {
  for (let at = node; at; at = at.parentElement) {
    const c = colour(view.getComputedStyle(at).backgroundColor);
    if (opaque(c)) return c.slice(0, 3);
  }
  return [255, 255, 255];
};
function measure(frame, width) {
  const doc = frame.contentDocument, view = frame.contentWindow, problems = [];
  const say = text => { if (problems.length < 20) problems.push(width + " px: " + text); };
  doc.querySelectorAll("details").forEach(d => { d.open = true; });
  if (doc.documentElement.scrollWidth > width) {
    const wide = [...doc.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > width + 1 && !e.closest(".scroll"));
    say("the page is " + doc.documentElement.scrollWidth + " wide: " + wide.slice(0, 3).map(e => e.outerHTML.slice(0, 80)));
  }
  const plots = [...doc.querySelectorAll("figure svg[role=img]")];
  let lines = 0, smallest = 1e9;
  for (const svg of plots) {
    const box = svg.getBoundingClientRect(), name = svg.querySelector("title").textContent.slice(0, 40);
    if (box.width < 100 || box.height < 60) say(name + ": " + box.width + " x " + box.height);
    if (box.left < -0.5 || box.right > width + 0.5) say(name + " is cut off at the side");
    const drawn = [...svg.querySelectorAll("path[class]")].filter(p => /c\d/.test(p.getAttribute("class")));
    if (!drawn.some(p => { const b = p.getBoundingClientRect(); return b.width > 1 || b.height > 1; })) say(name + ": nothing is drawn");
    for (const path of drawn) {
      lines += 1;
      const b = path.getBoundingClientRect();
      if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1) say(name + ": a line leaves the plot");
    }
    const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([text, a], i) => {
      smallest = Math.min(smallest, a.height);
      if (a.left < box.left - 1 || a.right > box.right + 1 || a.top < box.top - 1 || a.bottom > box.bottom + 1) say(name + ": the label " + text + " is cut off");
      for (const [other, b] of texts.slice(i + 1)) {
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2) say(name + ": " + text + " and " + other + " overlap");
      }
    });
  }
  for (const item of doc.querySelectorAll(".legend li, .card, h1, h2, h3, h4, nav li")) {
    const box = item.getBoundingClientRect();
    if (box.right > width + 0.5 || box.width < 5) say("cut off: " + item.textContent.slice(0, 40));
  }
  const seen = new Set();
  for (const node of doc.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["title", "desc"].includes(node.tagName)) continue;
    const style = view.getComputedStyle(node);
    const ink = colour(node.ownerSVGElement ? style.fill : style.color).slice(0, 3), paper = behind(view, node);
    const key = ink + "/" + paper;
    if (seen.has(key)) continue;
    seen.add(key);
    if (contrast(ink, paper) < 4.5) say("contrast " + contrast(ink, paper).toFixed(2) + ": " + node.textContent.slice(0, 40));
  }
  const focus = [...doc.querySelectorAll("a[href], summary, [tabindex]")].filter(e => e.tabIndex !== 0).length;
  if (focus) say(focus + " links, summaries or tables cannot be reached by keyboard");
  return { width, problems, plots: plots.length, lines, smallest, scripts: doc.scripts.length, title: doc.title,
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches, paper: view.getComputedStyle(doc.body).backgroundColor };
}
const frame = document.getElementById("frame");
frame.onload = () => {
  let found = [];
  try {
    for (const width of WIDTHS) { frame.style.width = width + "px"; found.push(measure(frame, width)); }
  } catch (e) { found = [{ problems: [String(e.stack)] }]; }
  document.getElementById("found").textContent = JSON.stringify(found);
};
frame.srcdoc = PAGE;
"#;

fn browser() -> PathBuf {
    let found =
        Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/find-browser.sh")).output().unwrap();
    assert!(
        found.status.success(),
        "there is no Chromium here; install one (Debian, Ubuntu: apt install chromium)"
    );
    PathBuf::from(String::from_utf8(found.stdout).unwrap().trim())
}

/// Runs the browser to its end; what it prints, and what its console says.
fn run(browser: &Path, profile: &Path, dark: bool, arguments: &[&str]) -> (String, String) {
    let scheme = format!("--blink-settings=preferredColorScheme={}", u8::from(!dark));
    let profile = format!("--user-data-dir={}", profile.display());
    let fixed = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        "--enable-logging=stderr",
    ];
    // One that hangs is tried once more: browsers without a screen sometimes do at their start.
    for _ in 0..2 {
        let mut child = Command::new("timeout")
            .args(["--kill-after=5", "120"])
            .arg(browser)
            .args(fixed)
            .args([&scheme, &profile])
            .args(arguments)
            .stdout(fs::File::create(profile_file(&profile, "stdout")).unwrap())
            .stderr(fs::File::create(profile_file(&profile, "stderr")).unwrap())
            .spawn()
            .unwrap();
        let status = child.wait().unwrap();
        let read =
            |name| String::from_utf8_lossy(&fs::read(profile_file(&profile, name)).unwrap()).into_owned();
        if status.success() {
            return (read("stdout"), read("stderr"));
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    panic!(
        "{} failed twice: {}",
        browser.display(),
        fs::read_to_string(profile_file(&profile, "stderr")).unwrap()
    );
}

fn profile_file(profile: &str, name: &str) -> PathBuf {
    Path::new(profile.trim_start_matches("--user-data-dir=")).with_extension(name)
}

/// What the console says of pages: errors, refused scripts and styles.
fn console(stderr: &str) -> Vec<&str> {
    stderr.lines().filter(|line| line.contains("CONSOLE")).collect()
}

#[test]
fn pages_are_legible_in_a_browser() {
    let browser = browser();
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pages");
    fs::create_dir_all(&dir).unwrap();
    let profiles = tempfile::tempdir().unwrap();
    let profile = profiles.path().join("profile");
    let mut wrong = Vec::new();
    for (name, sources) in sources::all() {
        let text = page(&sources).unwrap();
        let file = dir.join(format!("{name}.html"));
        fs::write(&file, &text).unwrap();
        // A script ends at its end tag, wherever that stands.
        let quoted = serde_json::to_string(&text).unwrap().replace('<', "\\u003c");
        let script = MEASURE.replace("WIDTHS", &format!("{WIDTHS:?}")).replace("PAGE", &quoted);
        let harness = format!(
            "<!DOCTYPE html><meta charset=\"utf-8\"><iframe id=\"frame\" style=\"border:0;height:900px\"></iframe>\
             <pre id=\"found\"></pre><script>{script}</script>"
        );
        let place = profiles.path().join("harness.html");
        fs::write(&place, harness).unwrap();
        for dark in [false, true] {
            let url = format!("file://{}", place.display());
            let (dom, stderr) =
                run(&browser, &profile, dark, &["--virtual-time-budget=20000", "--dump-dom", &url]);
            assert_eq!(console(&stderr), [""; 0], "{name}");
            let found = dom.rsplit_once("<pre id=\"found\">").unwrap().1.split("</pre>").next().unwrap();
            let found = found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
            let found: Vec<Value> =
                serde_json::from_str(&found).unwrap_or_else(|e| panic!("{name}: {e}: {found:?}"));
            assert_eq!(found.len(), WIDTHS.len(), "{name}: {found:?}");
            for at in &found {
                let problems = at["problems"].as_array().unwrap();
                wrong
                    .extend(problems.iter().map(|p| format!("{name}, dark {dark}, {}", p.as_str().unwrap())));
                assert_eq!(at["plots"], text.matches("<figure").count(), "{name}");
                assert!(at["lines"].as_u64() >= at["plots"].as_u64(), "{name}: {at}");
                assert!(at["smallest"].as_f64().unwrap() >= 9.0, "{name}: letters of {} px", at["smallest"]);
                assert_eq!((&at["dark"], &at["scripts"]), (&Value::from(dark), &0.into()), "{name}");
                assert_ne!(at["title"], "owned", "{name}: a script of the model ran");
                assert_eq!(at["paper"] == "rgb(255, 255, 255)", !dark, "{name}: {}", at["paper"]);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // By itself, with its own policy, and on paper.
    for name in ["hostile", "grid"] {
        let url = format!("file://{}", dir.join(format!("{name}.html")).display());
        let (dom, stderr) =
            run(&browser, &profile, false, &["--virtual-time-budget=5000", "--dump-dom", &url]);
        assert_eq!(console(&stderr), [""; 0], "{name}");
        assert!(!dom.contains("<script") && !dom.contains("<title>owned"), "{name}");
        let pdf = dir.join(format!("{name}.pdf"));
        run(
            &browser,
            &profile,
            true,
            &["--no-pdf-header-footer", &format!("--print-to-pdf={}", pdf.display()), &url],
        );
        assert!(fs::metadata(&pdf).unwrap().len() > 20_000, "{name}");
        for (kind, dark, size) in
            [("light", false, "1280,3000"), ("dark", true, "1280,3000"), ("narrow", false, "500,3000")]
        {
            let shot = format!("--screenshot={}", dir.join(format!("{name}-{kind}.png")).display());
            run(&browser, &profile, dark, &[&shot, &format!("--window-size={size}"), &url]);
        }
    }
}
