//! `ptxvm check`: the kernels of a PTX file and its errors, without running it.

use std::io::Write;
use std::path::{Path, PathBuf};

use ptxvm::error::{ErrorKind, Finding};
use ptxvm::ptx::ast::Function;
use ptxvm::ptx::parse;
use ptxvm::{Error, Module};

use super::{Failure, launch};

pub(crate) fn check(files: &[PathBuf]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let mut bad = false;
    for path in files {
        bad |= !one(path, &mut out)?;
    }
    out.flush()?;
    if bad { Err(Failure::Found) } else { Ok(()) }
}

/// Whether a file is free of findings.
fn one(path: &Path, out: &mut dyn Write) -> Result<bool, Failure> {
    let text = launch::text(path)?;
    let name = path.display().to_string();
    let findings = match Module::load(&name, &text) {
        Ok(_) => Vec::new(),
        Err(Error::Fault(found) | Error::Unsupported(found)) => found,
        Err(e) => return Err(e.into()),
    };
    let missing = findings.iter().filter(|f| f.kind == ErrorKind::Unsupported).count();
    match (findings.len() - missing, missing) {
        (0, 0) => writeln!(out, "{name}: runs")?,
        (0, n) => writeln!(out, "{name}: {n} not supported")?,
        (n, 0) => writeln!(out, "{name}: {n} wrong")?,
        (n, m) => writeln!(out, "{name}: {n} wrong, {m} not supported")?,
    }
    // What the parser cannot read has no kernels to list; the findings say so.
    let tree = parse(&name, &text).ok();
    for f in tree.iter().flat_map(|t| &t.functions).filter(|f| f.is_entry && f.body.is_some()) {
        writeln!(out, "  kernel {}", kernel(f))?;
    }
    for finding in &findings {
        writeln!(out, "{}", told(finding))?;
    }
    Ok(findings.is_empty())
}

/// A kernel's name, its parameters and its directives about blocks.
fn kernel(f: &Function<'_>) -> String {
    let params: Vec<String> = f.params.iter().map(launch::parameter).collect();
    let mut text = format!("{}({})", f.name, params.join(", "));
    if let Some([x, y, z]) = f.required_threads {
        text += &format!(", blocks of exactly {x},{y},{z} threads");
    }
    if let Some(most) = f.max_threads {
        let most: u64 = most.iter().map(|n| u64::from(*n)).fold(1, u64::saturating_mul);
        text += &format!(", blocks of at most {most} threads");
    }
    text
}

fn told(finding: &Finding) -> String {
    finding.to_string().lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}
