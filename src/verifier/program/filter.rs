//! The filter of system calls under which programs run: a seccomp filter, in the classic BPF that the kernel takes.
//!
//! It is a list of what is refused, because what a Python library needs differs from one C library and kernel to the next.
//! Refused is what reaches another process or the network, makes a process, gains rights, or takes memory that the limits do
//! not count. Each check is two or five instructions long, so no jump is far.

use std::fmt::Write;

/// One instruction, as `struct sock_filter` has it.
#[derive(Debug, Clone, Copy)]
struct Instruction {
    code: u32,
    if_true: u8,
    if_false: u8,
    operand: u32,
}

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const ANY_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Offsets in `struct seccomp_data`. Of an argument it is that of the low half, on the little-endian machines below.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

/// `AUDIT_ARCH_X86_64` or `AUDIT_ARCH_AARCH64` of linux/audit.h: the ELF machine, 64 bits, little-endian.
const MACHINE: u32 = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };
/// Numbers from here on are x86-64's calls in another ABI, by which a list of numbers would be got round.
const X32: u32 = 0x4000_0000;

/// Refused with EPERM.
const REFUSED: &[libc::c_long] = &[
    // Processes: threads alone can be made, see `filter`.
    libc::SYS_execve,
    libc::SYS_execveat,
    // Signals, and the memory and settings of other processes.
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_process_mrelease,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_kcmp,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    // Memory and files that no limit of ours counts.
    libc::SYS_memfd_create,
    libc::SYS_memfd_secret,
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_msgget,
    libc::SYS_semget,
    libc::SYS_mq_open,
    // Landlock bounds it from its third version on.
    libc::SYS_truncate,
    // Rights and the system.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_vhangup,
];
/// Refused as well where nothing else keeps a program from the modes, owners and times of files that it cannot open: Landlock
/// does not bound them.
const REFUSED_ALONE: &[libc::c_long] = &[
    libc::SYS_fchmodat,
    libc::SYS_fchmodat2,
    libc::SYS_fchownat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_utimensat,
];
/// Older calls, which x86-64 alone has.
#[cfg(target_arch = "x86_64")]
const OLD: (&[libc::c_long], &[libc::c_long]) = (
    &[libc::SYS_fork, libc::SYS_vfork],
    &[
        libc::SYS_chmod,
        libc::SYS_chown,
        libc::SYS_lchown,
        libc::SYS_utime,
        libc::SYS_utimes,
        libc::SYS_futimesat,
    ],
);
#[cfg(not(target_arch = "x86_64"))]
const OLD: (&[libc::c_long], &[libc::c_long]) = (&[], &[]);

/// When the low half of a call's first argument lets it through.
#[derive(Debug, Clone, Copy)]
enum Unless {
    /// It has one of these bits.
    Bits(u32),
    Is(u32),
    IsNot(u32),
}

/// The filter's bytes in hexadecimal digits. `alone` says that no namespace keeps the file system read-only.
pub(super) fn filter(alone: bool) -> String {
    let refusal = |errno: i32| libc::SECCOMP_RET_ERRNO | errno as u32;
    let always = |errno| Instruction { code: RETURN, if_true: 0, if_false: 0, operand: refusal(errno) };
    let load = |operand| Instruction { code: LOAD, if_true: 0, if_false: 0, operand };
    let jump = |code, operand, if_true, if_false| Instruction { code, if_true, if_false, operand };
    let end = |operand| Instruction { code: RETURN, if_true: 0, if_false: 0, operand };

    let mut program = vec![
        load(ARCHITECTURE),
        jump(EQUAL, MACHINE, 1, 0),
        end(libc::SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
        jump(AT_LEAST, X32, 0, 1),
        always(libc::ENOSYS),
    ];
    let mut refuse = |call: libc::c_long, errno| {
        program.extend([jump(EQUAL, call as u32, 0, 1), always(errno)]);
    };
    let lists =
        [REFUSED, OLD.0].into_iter().chain(alone.then_some([REFUSED_ALONE, OLD.1]).into_iter().flatten());
    lists.flatten().for_each(|&call| refuse(call, libc::EPERM));
    refuse(libc::SYS_socket, libc::EACCES);
    // Its flags are in memory, where no filter sees them. The C library then calls clone.
    refuse(libc::SYS_clone3, libc::ENOSYS);
    for (call, unless) in [
        (libc::SYS_clone, Unless::Bits(libc::CLONE_THREAD as u32)),
        (libc::SYS_prlimit64, Unless::Is(0)),
        (libc::SYS_sched_setaffinity, Unless::Is(0)),
        // Who is to die with its parent stays so.
        (libc::SYS_prctl, Unless::IsNot(libc::PR_SET_PDEATHSIG as u32)),
    ] {
        let check = match unless {
            Unless::Bits(bits) => jump(ANY_BIT, bits, 1, 0),
            Unless::Is(value) => jump(EQUAL, value, 1, 0),
            Unless::IsNot(value) => jump(EQUAL, value, 0, 1),
        };
        program.extend([
            jump(EQUAL, call as u32, 0, 4),
            load(FIRST_ARGUMENT),
            check,
            always(libc::EPERM),
            end(libc::SECCOMP_RET_ALLOW),
        ]);
    }
    program.push(end(libc::SECCOMP_RET_ALLOW));

    let mut hex = String::new();
    for Instruction { code, if_true, if_false, operand } in program {
        let [low, high] = (code as u16).to_ne_bytes();
        for byte in [low, high, if_true, if_false].into_iter().chain(operand.to_ne_bytes()) {
            write!(hex, "{byte:02x}").expect("a string takes everything");
        }
    }
    hex
}
