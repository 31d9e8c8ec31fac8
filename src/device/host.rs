//! The host's memory.

use std::fs;
use std::path::Path;

/// Bytes that this process may still take without another losing its own: what Linux calls available, or what is left
/// of a control group's limit where that is less (a container's, a batch job's). `None` where nothing says.
pub fn available() -> Option<u64> {
    available_below(Path::new("/"))
}

/// [`available`] of the machine whose `proc` and `sys` lie in `root`.
pub fn available_below(root: &Path) -> Option<u64> {
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let meminfo = read("proc/meminfo")?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let machine = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024;
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    // The cache of files is counted as used, and is given up when memory is short.
    let cached = |path: &str, name: &str| -> Option<u64> {
        let stat = read(path)?;
        stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
    };
    let left = |limit: u64, used: u64, cached: u64| limit.saturating_sub(used.saturating_sub(cached));
    let groups = read("proc/self/cgroup").unwrap_or_default();
    let mut least = machine;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let path = path.trim_matches('/');
        // A limit of any group on the way up holds. Inside a container the path may not lead anywhere, and the group's
        // own files are at the top.
        let ancestors = Path::new(path).ancestors().filter_map(Path::to_str);
        for group in ancestors {
            let found = match controllers {
                // Version 2: without a limit, `memory.max` is a word.
                "" => {
                    let at = |file: &str| format!("sys/fs/cgroup/{group}/{file}");
                    number(&at("memory.max")).zip(number(&at("memory.current"))).map(|(limit, used)| {
                        left(limit, used, cached(&at("memory.stat"), "inactive_file").unwrap_or(0))
                    })
                }
                "memory" => {
                    let at = |file: &str| format!("sys/fs/cgroup/memory/{group}/{file}");
                    number(&at("memory.limit_in_bytes")).zip(number(&at("memory.usage_in_bytes"))).map(
                        |(limit, used)| {
                            left(limit, used, cached(&at("memory.stat"), "total_inactive_file").unwrap_or(0))
                        },
                    )
                }
                _ => None,
            };
            least = least.min(found.unwrap_or(machine));
        }
    }
    Some(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of these files.
    fn machine(files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        available_below(root.path())
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:    8000 kB\n");

    #[test]
    fn the_least_of_machine_and_groups_is_left() {
        assert_eq!(machine(&[]), None);
        assert_eq!(machine(&[MEMINFO]), Some(8_192_000));
        let second = ("proc/self/cgroup", "0::/job/step\n");
        let current = ("sys/fs/cgroup/job/memory.current", "700000\n");
        let stat = ("sys/fs/cgroup/job/memory.stat", "anon 5\ninactive_file 100000\n");
        let limit = |text| ("sys/fs/cgroup/job/memory.max", text);
        assert_eq!(machine(&[MEMINFO, second, limit("1000000\n"), current]), Some(300_000));
        assert_eq!(machine(&[MEMINFO, second, limit("1000000\n"), current, stat]), Some(400_000));
        assert_eq!(machine(&[MEMINFO, second, limit("max\n"), current]), Some(8_192_000));
        assert_eq!(machine(&[MEMINFO, second, limit("600000\n"), current]), Some(0));
        // In a container, whose own files are at the top.
        let top = [("sys/fs/cgroup/memory.max", "5000"), ("sys/fs/cgroup/memory.current", "2000")];
        assert_eq!(machine(&[&[MEMINFO, second][..], &top].concat()), Some(3000));
        let first = [
            ("proc/self/cgroup", "9:name=systemd:/\n4:memory:/a\n0::/\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9000"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "5000"),
            ("sys/fs/cgroup/memory/a/memory.stat", "total_inactive_file 1000\n"),
        ];
        assert_eq!(machine(&[&[MEMINFO][..], &first].concat()), Some(5000));
    }
}
