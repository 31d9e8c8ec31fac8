//! The order in which a run's files reach the disk, as the system is asked for it: what is renamed into its place has been
//! synced, and what is removed is removed after its replacement is safe.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::fixture::{Fixture, Ran};

/// Stands before the C library's calls and writes a line for each into a log: `write PATH`, `sync PATH`,
/// `rename FROM > TO`, `remove PATH`.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static void say(const char *what, const char *path, const char *to) {
    char line[9000];
    int len = snprintf(line, sizeof line, "%s %s%s%s\n", what, path, to ? " > " : "", to ? to : "");
    int log = open(getenv("SHIM_LOG"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (log < 0 || syscall(SYS_write, log, line, (size_t)len) != len) abort();
    close(log);
}

static const char *named(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, 4095);
    path[len < 0 ? 0 : len] = 0;
    return path;
}

static void say_fd(const char *what, int fd) {
    char path[4096];
    if (named(fd, path)[0] == '/' && strncmp(path, "/dev/", 5)) say(what, path, NULL);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t len) {
    say_fd("write", fd);
    return REAL(write)(fd, data, len);
}
int fsync(int fd) {
    say_fd("sync", fd);
    return REAL(fsync)(fd);
}
int fdatasync(int fd) {
    say_fd("sync", fd);
    return REAL(fdatasync)(fd);
}
int rename(const char *from, const char *to) {
    say("rename", from, to);
    return REAL(rename)(from, to);
}
int unlink(const char *path) {
    say("remove", path, NULL);
    return REAL(unlink)(path);
}
int rmdir(const char *path) {
    say("remove", path, NULL);
    return REAL(rmdir)(path);
}
int unlinkat(int dir, const char *name, int flags) {
    char path[4096], whole[8192];
    if (dir == AT_FDCWD || name[0] == '/') {
        say("remove", name, NULL);
    } else {
        snprintf(whole, sizeof whole, "%s/%s", named(dir, path), name);
        say("remove", whole, NULL);
    }
    return REAL(unlinkat)(dir, name, flags);
}
"#;

/// One call.
#[derive(Debug, Clone, PartialEq)]
enum Call {
    Write(String),
    Sync(String),
    Rename(String, String),
    Remove(String),
}

/// A training run's calls, paths relative to the fixture.
fn recorded(f: &Fixture, set: &[&str]) -> Vec<Call> {
    let (source, shim, log) = (f.path("shim.c"), f.path("shim.so"), f.path("calls.log"));
    if !shim.exists() {
        fs::write(&source, SHIM).unwrap();
        let mut cc = std::process::Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&shim).arg(&source).arg("-ldl");
        let built = cc.output().expect("the C compiler, with which Rust links, can be started");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    }
    let _ = fs::remove_file(&log);
    let set = set.iter().flat_map(|s| if s.starts_with("--") { vec![*s] } else { vec!["--set", s] });
    let args: Vec<&str> = ["train", "run.toml"].into_iter().chain(set).collect();
    let mut command = f.command(&args);
    command.env("LD_PRELOAD", &shim).env("SHIM_LOG", &log);
    let ran = Ran::of(&mut command);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    // Descriptors are told by whole paths, arguments as the run gives them.
    let root = fs::canonicalize(f.root()).unwrap();
    let relative =
        |path: &str| Path::new(path).strip_prefix(&root).map_or(path.to_owned(), |p| p.display().to_string());
    let calls = fs::read_to_string(&log).unwrap();
    let call = |line: &str| {
        let (what, path) = line.split_once(' ').unwrap();
        match what {
            "write" => Call::Write(relative(path)),
            "sync" => Call::Sync(relative(path)),
            "remove" => Call::Remove(relative(path)),
            _ => {
                let (from, to) = path.split_once(" > ").unwrap();
                Call::Rename(relative(from), relative(to))
            }
        }
    };
    calls.lines().map(call).collect()
}

/// Every file and directory under `dir`, itself included, as paths that begin with `name`.
fn tree(dir: &Path, name: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::from([name.to_owned()]);
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let below = format!("{name}/{}", entry.file_name().to_str().unwrap());
        match entry.path().is_dir() {
            true => all.extend(tree(&entry.path(), &below)),
            false => drop(all.insert(below)),
        }
    }
    all
}

/// Asserts that what is renamed at `at` was synced before, after the last write to it, under whatever name it had; and
/// that the directory which holds the new name is synced before anything else is renamed or removed.
fn assert_safe(calls: &[Call], at: usize, names: &BTreeSet<String>, earlier: &[(&str, &str)]) {
    let Call::Rename(_, to) = &calls[at] else { panic!("{:?} is no rename", calls[at]) };
    for name in names {
        let last = |wanted: fn(&Call) -> Option<&String>| {
            let is = |path: &String| {
                path == name || earlier.iter().any(|(now, then)| name.replacen(now, then, 1) == *path)
            };
            calls[..at].iter().rposition(|call| wanted(call).is_some_and(is))
        };
        let synced = last(|call| if let Call::Sync(path) = call { Some(path) } else { None });
        let written = last(|call| if let Call::Write(path) = call { Some(path) } else { None });
        assert!(
            synced.is_some() && synced > written,
            "{name} is not on the disk when it becomes {to}: {calls:#?}"
        );
    }
    let (parent, _) = to.rsplit_once('/').unwrap();
    let safe = calls[at..].iter().position(|call| *call == Call::Sync(parent.into())).map(|i| at + i);
    let next = calls[at + 1..].iter().position(|call| matches!(call, Call::Rename(..) | Call::Remove(_)));
    let next = next.map_or(calls.len(), |i| at + 1 + i);
    assert!(
        safe.is_some_and(|safe| safe < next),
        "{parent} is not synced after {to} is in place: {calls:#?}"
    );
}

#[test]
fn checkpoints_and_files_are_on_the_disk_before_they_have_their_names() {
    let f = Fixture::new();
    let set = [
        "train.steps=3",
        "train.save_every=1",
        "train.keep_checkpoints=1",
        "data.eval_tasks=eval.jsonl",
        "train.eval_samples=2",
    ];
    let calls = recorded(&f, &set);
    let checkpoints = "out/checkpoints";
    let content = tree(&f.path("out/checkpoints/step-000003"), "");
    assert!(content.len() >= 8, "{content:?}");
    for step in 1..=3 {
        let place = format!("{checkpoints}/step-00000{step}");
        let at = calls.iter().position(|call| matches!(call, Call::Rename(_, to) if *to == place)).unwrap();
        let Call::Rename(partial, _) = &calls[at] else { unreachable!() };
        let names: BTreeSet<String> = content.iter().map(|name| format!("{partial}{name}")).collect();
        // The model's directory is written beside its place, too.
        let model = calls[..at].iter().rev().find_map(|call| match call {
            Call::Rename(from, to) if *to == format!("{partial}/model") => Some((to.as_str(), from.as_str())),
            _ => None,
        });
        assert_safe(&calls, at, &names, &[model.unwrap()]);
        // The manifest, which vouches for all, is written when all else is safe.
        let manifest = format!("{partial}/manifest.json");
        let written = calls.iter().position(|call| *call == Call::Write(manifest.clone())).unwrap();
        for name in names.iter().filter(|name| **name != manifest && *name != partial) {
            let synced = calls[..written].iter().position(|call| *call == Call::Sync(name.clone()));
            assert!(synced.is_some(), "{name} is not on the disk when the manifest is written: {calls:#?}");
        }
        // What the figures say of these steps.
        let log =
            |of: fn(String) -> Call| calls[..at].iter().rposition(|c| *c == of("out/metrics.jsonl".into()));
        assert!(
            log(Call::Write) < log(Call::Sync),
            "metrics.jsonl is not on the disk at step {step}: {calls:#?}"
        );
        // The checkpoint before it goes after it stands, and is no checkpoint any more when its first file goes.
        if step > 1 {
            let old = format!("{checkpoints}/step-00000{}", step - 1);
            let moved =
                calls.iter().position(|call| matches!(call, Call::Rename(from, _) if *from == old)).unwrap();
            let Call::Rename(_, trash) = &calls[moved] else { unreachable!() };
            assert!(moved > at, "{old} goes before {place} stands");
            let is_of = |path: &String, dir: &str| path == dir || path.starts_with(&format!("{dir}/"));
            let removed =
                |dir: &str| calls.iter().position(|c| matches!(c, Call::Remove(path) if is_of(path, dir)));
            let (first, safe) = (
                removed(trash).unwrap(),
                calls[moved..].iter().position(|call| *call == Call::Sync(checkpoints.into())).unwrap()
                    + moved,
            );
            assert!(
                moved < safe && safe < first,
                "the name of {old} is not gone when its files go: {calls:#?}"
            );
            assert_eq!(removed(&old), None);
        }
    }
    // Whatever else a run renames into place.
    for file in
        ["out/config.toml", "out/eval/step-000000.json", "out/eval/step-000003.json", "out/comparison.txt"]
    {
        let at = calls.iter().position(|call| matches!(call, Call::Rename(_, to) if to == file));
        let at = at.unwrap_or_else(|| panic!("{file} is not renamed into place: {calls:#?}"));
        let Call::Rename(from, _) = &calls[at] else { unreachable!() };
        assert_safe(&calls, at, &BTreeSet::from([from.clone()]), &[]);
        assert_eq!(
            calls.iter().position(|call| *call == Call::Write(file.into())),
            None,
            "{file} is written in place"
        );
    }
}
