//! Files: read with a limit, written beside their place and renamed.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use super::{Failure, usage};

/// All of a file, but no more than `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, Failure> {
    let told = |e: &dyn std::fmt::Display| Failure::Usage(format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(|e| told(&e))?;
    let size = file.metadata().map_err(|e| told(&e))?.len();
    let mut bytes = Vec::new();
    // An allocation that fails inside `read_to_end` is an error, not an abort; this only spares it the growing.
    bytes.try_reserve_exact(size.min(limit) as usize).map_err(|e| told(&e))?;
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| told(&e))?;
    if bytes.len() as u64 > limit {
        return usage(format!("{}: more than {limit} bytes", path.display()));
    }
    Ok(bytes)
}

/// Whether a file can be written there, as far as one can tell before the launch; its place behind links.
pub(crate) fn writable(path: &Path) -> Result<PathBuf, Failure> {
    match fs::metadata(path) {
        // Renaming would replace a device by a file.
        Ok(m) if !m.is_file() => {
            usage(format!("{}: exists and is no regular file; save to another place", path.display()))
        }
        Ok(_) => path.canonicalize().or_else(|e| usage(format!("{}: {e}", path.display()))),
        Err(_) => {
            let folder = folder(path);
            match (path.file_name(), folder.canonicalize()) {
                (Some(name), Ok(place)) if place.is_dir() => Ok(place.join(name)),
                _ => usage(format!("{}: there is no directory {}", path.display(), folder.display())),
            }
        }
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes a file with what `fill` gives it: whole, or not at all.
pub(crate) fn write(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.part", std::process::id()));
    let part = folder(path).join(name);
    let told = |e: std::io::Error| Failure::Usage(format!("{}: {e}", path.display()));
    let save = || {
        let mut file =
            BufWriter::new(OpenOptions::new().write(true).create_new(true).open(&part).map_err(told)?);
        fill(&mut file).map_err(|e| match e {
            Failure::Output(e) => told(e),
            other => other,
        })?;
        let file = file.into_inner().map_err(|e| told(e.into_error()))?;
        file.sync_all().map_err(told)?;
        fs::rename(&part, path).map_err(told)
    };
    save().inspect_err(|_| {
        // It may never have been made; the first error is the one to tell.
        let _ = fs::remove_file(&part);
    })
}
