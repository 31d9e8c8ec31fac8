//! Programmatic dependent launch: the blocks of a kernel take their places while the kernel before it still runs, and wait
//! there until that one has ended and its writes are seen. Between two kernels nothing is left of the time that a launch
//! takes but the first accesses to memory. From compute capability 9.0 on (CUDA C++ Programming Guide, "Programmatic
//! Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol`).
//!
//! The kernels are written for compute capability 8.0, which has no such instruction. Every entry point begins alike, so
//! the text of a module is changed instead: for a GPU when it is loaded, and by `build.rs` for its machine code.

/// The least compute capability, as in (9, 0).
pub const CAPABILITY: (i32, i32) = (9, 0);

/// What the instructions need in the head of a module, at least.
const VERSION: (u32, u32) = (7, 8);
const TARGET: u32 = 90;

/// An entry point's first instructions. The next kernel may take its places at once, since it waits as well. What this one
/// reads or overwrites may be in use by the one before it until the second instruction: it stands ahead of all accesses.
const BEGIN: &str = "\tgriddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;\n";

/// Loads of what nobody writes while the kernel runs. ptxas moves them ahead of everything, of the wait as well (13.2, on
/// sm_90 and sm_120): here they are ordinary loads.
const READ_ONLY: &str = "ld.global.nc.";
const ORDINARY: &str = "ld.global.";

/// The text of a module, as nvcc writes it, for GPUs of [`CAPABILITY`] and later. Launched in the ordinary way its kernels do
/// the same as before.
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

/// A directive of the head that asks for less than the instructions need, raised to that.
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
