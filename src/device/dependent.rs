//! Programmatic dependent launch: the blocks of a kernel become resident while the kernel before it still runs, and wait until
//! that kernel has ended and its writes are visible. Of the time between two kernels only the first accesses to memory remain then.
//! GPUs have this from compute capability 9.0 on (CUDA C++ Programming Guide, "Programmatic Dependent Launch and
//! Synchronization"; PTX ISA, `griddepcontrol`).
//!
//! The kernels are written for compute capability 8.0, which has no such instruction. The instructions are inserted into the PTX
//! of a module instead, which is possible because every entry point begins alike: when a module is loaded on such a GPU, and by
//! `build.rs` for its machine code.

/// The least compute capability, as in (9, 0).
pub const CAPABILITY: (i32, i32) = (9, 0);

/// The least version and target in the head of a module that allow these instructions.
const VERSION: (u32, u32) = (7, 8);
const TARGET: u32 = 90;

/// An entry point's first instructions. The first lets the next kernel become resident at once, which is safe because that kernel
/// waits as well. The second stands ahead of all accesses, because until it completes the kernel before may still use the memory
/// that this one reads or writes.
const BEGIN: &str = "\tgriddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;\n";

/// Loads of memory that nobody writes while the kernel runs. They become ordinary loads, because ptxas moves the former ahead
/// of all other instructions, also of the wait (seen with 13.2, on sm_90 and sm_120).
const READ_ONLY: &str = "ld.global.nc.";
const ORDINARY: &str = "ld.global.";

/// Rewrites a module as nvcc writes it for GPUs of [`CAPABILITY`] and later. Launched in the ordinary way, its kernels do the same
/// as before.
pub fn dependent(ptx: &str) -> String {
    let mut text = String::with_capacity(ptx.len() + ptx.len() / 64);
    let mut head = false;
    for line in ptx.lines() {
        text.push_str(&raised(line).unwrap_or_else(|| line.replace(READ_ONLY, ORDINARY)));
        text.push('\n');
        head |= line.contains(".entry ");
        if head && line.ends_with('{') {
            head = false;
            text.push_str(BEGIN);
        }
    }
    text
}

/// A directive of the head, raised to the version or target that the instructions need; `None` if it is no such directive or
/// needs no change.
fn raised(line: &str) -> Option<String> {
    if let Some(target) = line.strip_prefix(".target sm_") {
        let digits = target.find(|c: char| !c.is_ascii_digit()).unwrap_or(target.len());
        let raised = target[..digits].parse().is_ok_and(|target: u32| target < TARGET);
        return raised.then(|| format!(".target sm_{TARGET}"));
    }
    let (major, minor) = line.strip_prefix(".version ")?.trim().split_once('.')?;
    let version: (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    (version < VERSION).then(|| format!(".version {}.{}", VERSION.0, VERSION.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "//\n.version 7.4\n.target sm_80\n.address_size 64\n\n";

    #[test]
    fn every_entry_point_waits_first() {
        let kernel = |name: &str, begin: &str| {
            format!(
                ".visible .entry {name}(\n\t.param .u64 {name}_param_0\n)\n.maxntid 128, 1, 1\n{{\n{begin}\t.reg .b32 %r<2>;\n\n\t{{\n\tret;\n\t}}\n}}\n"
            )
        };
        let function = ".func add(.param .b32 x)\n{\n\tret;\n}\n";
        let text = |begin| [kernel("one", begin), function.to_owned(), kernel("two", begin)].concat();
        let want = HEAD.replace("7.4", "7.8").replace("sm_80", "sm_90") + &text(BEGIN);
        assert_eq!(dependent(&(HEAD.to_owned() + &text(""))), want);
    }

    #[test]
    fn no_load_is_one_that_may_move_ahead_of_the_wait() {
        let body = |nc: &str| format!("{HEAD}\tld.global{nc}.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd1];\n");
        let want = body("").replace("7.4", "7.8").replace("sm_80", "sm_90");
        assert_eq!(dependent(&body(".nc")), want);
    }

    #[test]
    fn a_later_target_stays() {
        for (head, want) in [
            (".version 8.3\n.target sm_90a\n", ".version 8.3\n.target sm_90a\n"),
            (
                ".version 7.10\n.target sm_100, texmode_independent\n",
                ".version 7.10\n.target sm_100, texmode_independent\n",
            ),
            (".version 7.7\n.target sm_89\n", ".version 7.8\n.target sm_90\n"),
        ] {
            assert_eq!(dependent(head), want);
        }
    }
}
