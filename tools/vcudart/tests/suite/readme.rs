//! The README's first example is run as it stands there.

use std::fs;
use std::process::Command;

use crate::toolchain::{crate_folder, nvcc, runtime};

#[test]
fn the_first_example_gives_what_the_readme_says() {
    let text = fs::read_to_string(crate_folder().join("README.md")).unwrap();
    let block = |mark: &str| {
        let (_, rest) = text.split_once(mark).unwrap_or_else(|| panic!("README.md has no {mark}"));
        rest.split_once("\n```").unwrap().0
    };
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("scale.cu"), block("```cuda\n")).unwrap();
    let session = block("```console\n");
    let mut wanted: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in session.lines() {
        match (line.strip_prefix("$ "), wanted.last_mut()) {
            (Some(command), _) => wanted.push((command, vec![])),
            (None, Some((_, lines))) => lines.push(line),
            (None, None) => panic!("{line} has no command"),
        }
    }
    assert!(wanted.len() >= 2, "{session}");
    let bin = nvcc().parent().unwrap().to_owned();
    let path = std::env::join_paths(
        [bin].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    for (command, lines) in wanted {
        let command = command.replace("/tmp/vcudart", runtime().to_str().unwrap());
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &format!("{command} 2>&1")])
            .current_dir(folder.path())
            .env("PATH", path.as_ref().unwrap());
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("VCUDA_"))
        {
            shell.env_remove(name);
        }
        let out = shell.env_remove("CUDA_LAUNCH_BLOCKING").output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        // Where the compiler was started is another folder each time.
        let said = said.replace(&format!("{}/", folder.path().display()), "");
        assert_eq!(said.lines().collect::<Vec<_>>(), lines, "{command}");
    }
}
