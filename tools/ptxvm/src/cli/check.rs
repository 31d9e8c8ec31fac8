//! `ptxvm check`: the kernels of a PTX file and its errors, without running it.

use std::collections::HashMap;
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
    let (module, findings) = match Module::load(&name, &text) {
        Ok(module) => (Some(module.clone()), module.refused()),
        Err(Error::Fault(found) | Error::Unsupported(found)) => (None, found),
        Err(e) => return Err(e.into()),
    };
    // What the parser cannot read has no kernels to list; the findings say so.
    let tree = parse(&name, &text).ok();
    let kernels: Vec<_> =
        tree.iter().flat_map(|t| &t.functions).filter(|f| f.is_entry && f.body.is_some()).collect();
    let runs = |f: &Function<'_>| module.as_ref().is_some_and(|module| module.runs(f.name));
    let running = kernels.iter().filter(|f| runs(f)).count();
    let missing = findings.iter().filter(|f| f.kind == ErrorKind::Unsupported).count();
    let counted = |n: usize, what: &str| (n > 0).then(|| format!("{n} {what}"));
    let of_kernels = (running > 0).then(|| format!("{running} of {} kernels run", kernels.len()));
    let told = [of_kernels, counted(findings.len() - missing, "wrong"), counted(missing, "not supported")];
    let told: Vec<String> = told.into_iter().flatten().collect();
    let verdict = if findings.is_empty() { "runs".to_owned() } else { told.join(", ") };
    writeln!(out, "{name}: {verdict}")?;
    for f in kernels {
        let but = if runs(f) || running == 0 { "" } else { ": does not run" };
        writeln!(out, "  kernel {}{but}", kernel(f))?;
    }
    for (finding, count) in grouped(&findings) {
        let text = finding.to_string().lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n");
        writeln!(out, "{text}")?;
        if count > 1 {
            writeln!(
                out,
                "    and at {}",
                if count == 2 { "1 more place".into() } else { format!("{} more places", count - 1) }
            )?;
        }
    }
    Ok(findings.is_empty())
}

/// The first of all findings that say the same, and how many do.
fn grouped(findings: &[Finding]) -> Vec<(&Finding, usize)> {
    let mut groups: Vec<(&Finding, usize)> = Vec::new();
    let mut known = HashMap::new();
    for finding in findings {
        let i = *known.entry((finding.kind, &finding.message)).or_insert(groups.len());
        match groups.get_mut(i) {
            Some((_, count)) => *count += 1,
            None => groups.push((finding, 1)),
        }
    }
    groups
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
