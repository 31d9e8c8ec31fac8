//! What build.rs reads in the text of kernels: the names of entry points, and what `// shared` marks.
//!
//! Every line of a .cu or .cuh that ends in `// shared` declares what a launcher needs too, in one of three forms:
//!
//! | line | the launcher has |
//! |---|---|
//! | `constexpr <type> NAME = <number>;` | `NAME` |
//! | `struct Name {`, with `static_assert(sizeof(Name) == <number>);` in the same file | `NAME_BYTES` |
//! | `using Name = Template<<number>, ..>;` | `NAME`, an array of the leading arguments, which are numbers |

use std::collections::BTreeMap;

/// An entry point of a kernel file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryPoint {
    /// Its name in the PTX.
    pub name: String,
    /// The line, from 1, of its `extern "C"`, or of the `#define` of its family.
    pub line: usize,
    /// The first argument of its `__launch_bounds__`, the threads of a block.
    pub threads: String,
}

const ENTRY: &str = "extern \"C\" __global__";

/// The entry points of a .cu in the order of the text: `extern "C" __global__ void [__launch_bounds__(..)] name(`, and those of
/// families, macros of such an entry point, each use of which begins a line:
///
/// ```text
/// #define FORWARD(TILE) \
///     extern "C" __global__ void __launch_bounds__(128) forward_##TILE(..) { \
///     ..
/// FORWARD(32x16)
/// ```
///
/// # Errors
///
/// The line, and what is wrong with it.
pub fn entries(text: &str) -> Result<Vec<EntryPoint>, String> {
    let mut families: Vec<Family> = Vec::new();
    let mut found = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((i, line)) = lines.next() {
        let at = |problem: String| format!("{}: {problem}", i + 1);
        if let Some(define) = line.strip_prefix("#define ") {
            let mut body = define.trim_end_matches('\\').to_owned();
            let mut last = line;
            while last.ends_with('\\') {
                last = lines.next().map_or("", |(_, line)| line);
                body += last.trim_end_matches('\\');
                body.push('\n');
            }
            families.extend(Family::new(&body, i + 1).map_err(at)?);
        } else if line.starts_with(ENTRY) {
            let rest: Vec<&str> = text.lines().skip(i).take(4).collect();
            found.push(entry_point(&rest.join("\n"), i + 1).map_err(at)?);
        } else if line.contains(ENTRY) && !line.trim_start().starts_with("//") {
            return Err(at(format!("`{ENTRY}` stands at the beginning of a line or in a #define")));
        } else if let Some((name, arguments)) = line.split_once('(')
            && let Some(family) = families.iter().find(|family| family.name == name)
        {
            found.push(family.entry_point(arguments).map_err(at)?);
        }
    }
    Ok(found)
}

/// A macro of an entry point.
struct Family {
    name: String,
    parameters: Vec<String>,
    /// Its entry point, whose name has `##PARAMETER` in it.
    entry: EntryPoint,
}

impl Family {
    /// Of `NAME(PARAMETERS) body`; `None` where the body has no entry point.
    fn new(define: &str, line: usize) -> Result<Option<Self>, String> {
        let Some((head, body)) = define.split_once(ENTRY) else { return Ok(None) };
        let (name, parameters) = head
            .split_once('(')
            .ok_or("a macro of an entry point has a parameter, which its name ends in")?;
        let parameters = parameters.split(')').next().unwrap_or("");
        if body.contains(ENTRY) {
            return Err(format!("{name} has two entry points; make it two macros"));
        }
        Ok(Some(Self {
            name: name.trim().to_owned(),
            parameters: parameters.split(',').map(|p| p.trim().to_owned()).collect(),
            entry: entry_point(&format!("{ENTRY}{body}"), line)?,
        }))
    }

    /// Of the use `NAME(arguments)`.
    fn entry_point(&self, arguments: &str) -> Result<EntryPoint, String> {
        let (arguments, _) = arguments.split_once(')').ok_or(format!("{}( is not closed", self.name))?;
        let arguments: Vec<&str> = arguments.split(',').map(str::trim).collect();
        if arguments.len() != self.parameters.len() {
            let (want, have) = (self.parameters.len(), arguments.len());
            return Err(format!("{} takes {want} arguments, not {have}", self.name));
        }
        let mut entry = self.entry.clone();
        for (parameter, argument) in self.parameters.iter().zip(arguments) {
            for text in [&mut entry.name, &mut entry.threads] {
                *text = text.replace(&format!("##{parameter}"), argument);
            }
        }
        Ok(entry)
    }
}

/// That of `extern "C" __global__ ..`.
fn entry_point(text: &str, line: usize) -> Result<EntryPoint, String> {
    let rest = text.trim_start_matches(ENTRY).trim_start();
    let rest = rest.strip_prefix("void").ok_or("a kernel returns void")?.trim_start();
    let bounds = rest.strip_prefix("__launch_bounds__(").ok_or("a kernel says its __launch_bounds__(..)")?;
    let (bounds, rest) = bounds.split_once(')').ok_or("__launch_bounds__( is not closed")?;
    let (name, _) = rest.split_once('(').ok_or("a kernel has parameters, in the lines after its name")?;
    let threads = bounds.split(',').next().unwrap_or("").trim();
    Ok(EntryPoint { name: name.trim().to_owned(), line, threads: threads.to_owned() })
}

/// What a launcher has of a kernel file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A constant, or the size of a struct in bytes.
    Number(u64),
    /// Arguments of a template.
    Numbers(Vec<u64>),
}

/// A file's values by name.
pub type Shared = BTreeMap<String, Value>;

/// Adds to `shared` what lines of a .cu or .cuh mark. Where two files of one stem mark a name, they must agree.
///
/// # Errors
///
/// The line, and what is wrong with it.
pub fn add_shared(text: &str, shared: &mut Shared) -> Result<(), String> {
    for (i, line) in text.lines().enumerate() {
        let Some((code, rest)) = line.split_once("// shared") else { continue };
        // Not a sentence that begins so.
        if code.trim().is_empty() || !(rest.is_empty() || rest.starts_with(':')) {
            continue;
        }
        let at = |problem: String| format!("{}: `// shared`: {problem}", i + 1);
        let (name, value) = shared_line(code.trim(), text).map_err(at)?;
        if let Some(other) = shared.insert(name.clone(), value.clone())
            && other != value
        {
            return Err(at(format!("`{name}` is {other:?} elsewhere, and {value:?} here")));
        }
    }
    Ok(())
}

fn shared_line(code: &str, text: &str) -> Result<(String, Value), String> {
    if let Some(constant) = code.strip_prefix("constexpr ") {
        let parts = constant.strip_suffix(';').and_then(|c| c.split_once(" = "));
        let name = parts.and_then(|(declared, _)| declared.split_whitespace().last());
        let value = parts.and_then(|(_, value)| value.parse().ok());
        return name
            .zip(value)
            .map(|(name, value)| (name.to_owned(), Value::Number(value)))
            .ok_or_else(|| format!("want `constexpr <type> NAME = <decimal number>;`, not `{code}`"));
    }
    if let Some(alias) = code.strip_prefix("using ") {
        let parts = alias.strip_suffix(">;").and_then(|a| a.split_once(" = "));
        let arguments = parts.and_then(|(_, template)| template.split_once('<'));
        let numbers: Vec<u64> = arguments
            .map(|(_, list)| list.split(',').map_while(|x| x.trim().parse().ok()).collect())
            .unwrap_or_default();
        return match parts {
            Some((name, _)) if !numbers.is_empty() => {
                Ok((snake(name).to_uppercase(), Value::Numbers(numbers)))
            }
            _ => Err(format!("want `using Name = Template<<decimal number>, ..>;`, not `{code}`")),
        };
    }
    let name = code.strip_suffix(" {").filter(|code| code.starts_with("struct "));
    let name = name.and_then(|code| code.split_whitespace().last());
    let Some(name) = name else {
        return Err(format!("stands behind a constexpr, a struct or a using, not `{code}`"));
    };
    let size = format!("static_assert(sizeof({name}) == ");
    let size = text.split_once(&size).and_then(|(_, rest)| rest.split(')').next()?.parse().ok());
    let size =
        size.ok_or_else(|| format!("want `static_assert(sizeof({name}) == <number>);` in this file"))?;
    Ok((format!("{}_BYTES", snake(name).to_uppercase()), Value::Number(size)))
}

/// KeyItem -> key_item.
fn snake(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.extend(c.to_lowercase());
    }
    out
}
