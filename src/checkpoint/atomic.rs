//! Files and directories that appear whole or not at all: written beside their place, synced, renamed into it.
//!
//! What a killed process leaves behind is `NAME.partial-<pid>-<n>` beside the target: never read, safe to delete.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Action, FileError};

/// Writes a file through `write` beside `path`, then syncs and renames it over `path`. Until the rename, and on any
/// error, the old file stays as it was.
pub fn write_file(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), FileError> {
    let (partial, file) = Partial::create(path, |p| File::create_new(p))?;
    let error = FileError::io(Action::Write, path);
    let done = (|| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        write(&mut out)?;
        out.into_inner().map_err(|e| e.into_error())?.sync_all()?;
        fs::rename(&partial.path, path)?;
        sync_dir(parent(path))
    })();
    done.map_err(error)
}

/// Writes a directory through `write`, which is given the empty directory to fill, then syncs all of it and renames
/// it to `target`. On any error `target` stays as it was.
///
/// An existing directory is replaced only if each of its entries has a namesake in the new one, so that a mistyped
/// path cannot cost anybody's files. The swap is one system call where the file system has it (Linux and macOS on
/// local disks); elsewhere a crash between two renames leaves the old directory under its `.partial` name.
pub fn replace_dir<E: From<FileError>>(
    target: &Path,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    replaceable(target)?;
    let (partial, ()) = Partial::create(target, |p| fs::create_dir(p))?;
    write(&partial.path)?;
    let error = FileError::io(Action::Write, target);
    sync_tree(&partial.path)?;
    if replaceable(target)? {
        if let Some(entry) = lost_entry(target, &partial.path)? {
            return Err(FileError::WouldLose { path: target.to_owned(), entry }.into());
        }
        // Afterwards `partial.path` names the old directory, which `partial` removes when it goes.
        swap(&partial.path, target)
    } else {
        fs::rename(&partial.path, target)
    }
    .and_then(|()| sync_dir(parent(target)))
    .map_err(error)?;
    Ok(())
}

/// A file or directory of our own beside the target; what bears its name is removed when the value goes.
struct Partial {
    path: PathBuf,
}

impl Partial {
    fn create<T>(target: &Path, create: impl Fn(&Path) -> io::Result<T>) -> Result<(Self, T), FileError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let Some(name) = target.file_name() else {
            let problem = "the path must end in a name";
            return Err(FileError::Target { path: target.to_owned(), problem });
        };
        loop {
            let mut name = name.to_owned();
            name.push(format!(".partial-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
            let path = target.with_file_name(name);
            match create(&path) {
                Ok(made) => return Ok((Self { path }, made)),
                // In containers process ids repeat: what a killed namesake left is skipped.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(FileError::io(Action::Write, target)(e)),
            }
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After a plain rename nothing stands here; nor can a failure to clean up undo the success.
        let _ = match fs::symlink_metadata(&self.path) {
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(&self.path),
            Ok(_) => fs::remove_file(&self.path),
            Err(_) => Ok(()),
        };
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether a directory stands at `target`; anything else there is an error.
fn replaceable(target: &Path) -> Result<bool, FileError> {
    match fs::symlink_metadata(target) {
        Ok(meta) if meta.is_dir() => Ok(true),
        Ok(_) => {
            let problem = "a file or link stands there; remove it, or choose another directory";
            Err(FileError::Target { path: target.to_owned(), problem })
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(FileError::io(Action::Write, target)(e)),
    }
}

/// The first entry (by name) of `old` that has no namesake in `new`.
fn lost_entry(old: &Path, new: &Path) -> Result<Option<String>, FileError> {
    let mut lost = Vec::new();
    for entry in fs::read_dir(old).map_err(FileError::io(Action::Read, old))? {
        let name = entry.map_err(FileError::io(Action::Read, old))?.file_name();
        if fs::symlink_metadata(new.join(&name)).is_err() {
            lost.push(name.to_string_lossy().into_owned());
        }
    }
    Ok(lost.into_iter().min())
}

fn swap(new: &Path, target: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE) {
            // NFS and some overlays cannot exchange.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP | Errno::XDEV) => {}
            done => return Ok(done?),
        }
    }
    swap_in_steps(new, target)
}

/// [`swap`] where the file system cannot exchange two names at once.
fn swap_in_steps(new: &Path, target: &Path) -> io::Result<()> {
    let mut aside = new.as_os_str().to_owned();
    aside.push("-old");
    let aside = PathBuf::from(aside);
    fs::rename(target, &aside)?;
    if let Err(e) = fs::rename(new, target) {
        fs::rename(&aside, target)?;
        return Err(e);
    }
    // Back under the name that `Partial` removes.
    fs::rename(&aside, new)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Syncs every file and directory of a tree to disk.
fn sync_tree(dir: &Path) -> Result<(), FileError> {
    let error = || FileError::io(Action::Write, dir);
    for entry in fs::read_dir(dir).map_err(error())? {
        let path = entry.map_err(error())?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|f| f.sync_all()).map_err(FileError::io(Action::Write, &path))?;
        }
    }
    sync_dir(dir).map_err(error())
}

/// Writes all of `bytes` as a new file inside a directory that [`replace_dir`] is filling.
pub fn write_new(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    File::create_new(path).and_then(|mut f| f.write_all(bytes)).map_err(FileError::io(Action::Write, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_swap_do_the_same() {
        for way in [swap, swap_in_steps] {
            let root = tempfile::tempdir().unwrap();
            let (new, target) = (root.path().join("new"), root.path().join("target"));
            for (dir, content) in [(&new, "n"), (&target, "t")] {
                fs::create_dir(dir).unwrap();
                fs::write(dir.join("file"), content).unwrap();
            }
            way(&new, &target).unwrap();
            assert_eq!(fs::read(target.join("file")).unwrap(), b"n");
            assert_eq!(fs::read(new.join("file")).unwrap(), b"t");
            assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
        }
    }

    #[test]
    fn a_swap_that_fails_half_way_is_undone() {
        let root = tempfile::tempdir().unwrap();
        let (absent, target) = (root.path().join("absent"), root.path().join("target"));
        fs::create_dir(&target).unwrap();
        assert!(swap_in_steps(&absent, &target).is_err());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        assert!(target.is_dir());
    }
}
