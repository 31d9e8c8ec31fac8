"""Judges programs for the `program` verifier. Python's standard library alone; 3.9 or newer.

Started once per worker. Its own text and its settings (JSON) come over stdin, see LOADER in mod.rs. For each verdict it then reads

    16 hexadecimal digits: the lengths of two parts in bytes, 8 digits each
    the program:  {"source": ..., "entry_point": ...}
    the exam:     {"setup": ..., "tests": ..., "entry_point": ...}

and writes one line of JSON to stdout: {"verdict": "pass" | "fail" | "unjudged", "why": ...}. Before the first, one line says
what could not be confined: {"ready": true, "open": [[what, why], ...]}.

Four kinds of processes, so that nobody who holds a verdict ever runs what a model wrote:

    keeper     enters namespaces, and removes the working directory at the end (only where there are namespaces)
    warden     forks the other two, bounds their time, kills what is left. It reads no part of any request, so that the memory
               that its children inherit holds no tests and no other responses.
    candidate  reads the program, gives up all rights, runs it, and then answers calls of its entry point
    examiner   reads the exam and runs it. In it the entry point is a stand-in that sends arguments to the candidate and gets
               its result, both as plain data. Assertions are evaluated here, and here alone.
"""

import fcntl
import gc
import json
import os
import random
import resource
import select
import signal
import stat
import sys
import tempfile
import time
import types
from decimal import Decimal
from fractions import Fraction

try:
    import ctypes
except ImportError:  # an interpreter that was built without it
    ctypes = None

# What programs usually import, so that forks find it in memory.
for name in (
    "abc array ast base64 bisect calendar cmath collections collections.abc contextlib copy csv dataclasses datetime enum "
    "functools hashlib heapq inspect io itertools keyword locale math numbers operator pprint queue re statistics string "
    "struct textwrap threading traceback typing unicodedata uuid warnings weakref zlib"
).split():
    try:
        __import__(name)
    except ImportError:
        pass

# Set by `main`.
SETTINGS = {}
WORK = ""
MAX_REPLY_BYTES = 64 << 20
# Seconds.
UNTIL_READ = 30


# ------------------------------------------------------------------------------------------------------- plain data
# JSON with one-key objects for what JSON has no words for. Subclasses are sent as what they derive from, by the methods of
# that, so that no object with an opinion of its own on equality reaches an assertion.


class Foreign(BaseException):
    """A value that is no plain data. Not an Exception: no test may catch it."""


def encode(value):
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        value = int.__index__(value)
        return value if -(1 << 53) < value < 1 << 53 else {"i": hex(value)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"t": [encode(item) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"d": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    if isinstance(value, set):
        return {"s": [encode(item) for item in set.__iter__(value)]}
    if isinstance(value, frozenset):
        return {"f": [encode(item) for item in frozenset.__iter__(value)]}
    if isinstance(value, bytes):
        return {"b": bytes.hex(value)}
    if isinstance(value, bytearray):
        return {"B": bytearray.hex(value)}
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    if isinstance(value, range):
        return {"r": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, Fraction):
        return {"q": [encode(value.numerator), encode(value.denominator)]}
    if isinstance(value, Decimal):
        return {"D": Decimal.__str__(value)}
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return encode(value.item())
    if hasattr(type(value), "__next__"):
        return {"g": [encode(item) for item in value]}
    raise Foreign(type(value).__name__)


def decode(value):
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    if tag == "i":
        return int(inner, 16)
    if tag == "t":
        return tuple(decode(item) for item in inner)
    if tag == "d":
        return {decode(key): decode(item) for key, item in inner}
    if tag == "s":
        return {decode(item) for item in inner}
    if tag == "f":
        return frozenset(decode(item) for item in inner)
    if tag == "b":
        return bytes.fromhex(inner)
    if tag == "B":
        return bytearray.fromhex(inner)
    if tag == "c":
        return complex(*inner)
    if tag == "r":
        return range(*map(decode, inner))
    if tag == "q":
        return Fraction(*map(decode, inner))
    if tag == "D":
        return Decimal(inner)
    if tag == "g":
        return iter([decode(item) for item in inner])
    raise ValueError(tag)


def replace(old, new):
    """Makes a mutable argument what the candidate made of its copy."""
    if type(old) is type(new):
        if isinstance(old, (list, bytearray)):
            old[:] = new
        elif isinstance(old, (dict, set)):
            old.clear()
            old.update(new)


# ----------------------------------------------------------------------------------------------------------- pipes


def read_exactly(fd, count):
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def write_all(fd, data):
    while data:
        data = data[os.write(fd, data) :]


class Lines:
    """Lines from a descriptor; None at its end, or where a line is longer than anybody needs."""

    def __init__(self, fd):
        self.fd, self.rest = fd, b""

    def next(self):
        parts = [self.rest]
        size = len(self.rest)
        while b"\n" not in parts[-1]:
            part = os.read(self.fd, 1 << 16)
            size += len(part)
            if not part or size > MAX_REPLY_BYTES:
                return None
            parts.append(part)
        line, self.rest = b"".join(parts).split(b"\n", 1)
        return line


# ------------------------------------------------------------------------------------------------------ confinement
# Numbers are those of the kernel's headers, the same on every architecture; system calls' come with the settings.

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
NEW_USER, NEW_PID, NEW_NET, NEW_IPC, NEW_UTS, NEW_MOUNTS = (
    0x10000000,
    0x20000000,
    0x40000000,
    0x08000000,
    0x04000000,
    0x00020000,
)
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE, MOUNT_READ_ONLY = -100, 0x8000, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REFER, TRUNCATE, IOCTL_DEV = (1 << bit for bit in (0, 1, 2, 3, 13, 14, 15))
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

LIBC = ctypes.CDLL(None, use_errno=True) if ctypes else None


def kernel(function, *arguments):
    """Calls a function of the C library; a failure is an OSError."""
    result = getattr(LIBC, function)(*arguments)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")
    return result


def system_call(name, *arguments):
    result = LIBC.syscall(SETTINGS["kernel"][name], *arguments)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def prctl(option, value):
    kernel("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def enter_namespaces():
    """A user namespace, and in it processes, network and the rest of one's own. The next fork is the first process there."""
    user, group = os.getuid(), os.getgid()
    kernel("unshare", NEW_USER | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS | NEW_MOUNTS)
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)
    kernel("mount", None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)


def mount_own_files(place):
    """Everything read-only, but for an empty directory in memory, which goes with the process."""
    kernel("unshare", NEW_MOUNTS)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_READ_ONLY, 0, 0, 0)
    system_call("mount_setattr", AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.c_size_t(32))
    options = f"mode=700,size={SETTINGS['disk']},nr_inodes=4096".encode()
    flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC)
    kernel("mount", b"tmpfs", os.fsencode(place), b"tmpfs", flags, options)


def readable():
    """What an interpreter reads while it runs: its library and the system's."""
    # Not all of a prefix: it may be the folder of a project.
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, "/", "/usr", "/usr/local"}
    found = {os.path.join(prefix, part) for prefix in prefixes for part in ("lib", "lib64", "share/zoneinfo")}
    found |= {"/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/dev/zero", "/dev/random", "/dev/urandom", *sys.path}
    return [path for path in sorted(found) if path != "/" and os.path.exists(path)]


def lock_files(version, place):
    """Landlock: reads what `readable` says, writes in `place`, and nothing else."""
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = (ctypes.c_uint64 * 3)(handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = system_call("landlock_create_ruleset", attributes, ctypes.c_size_t(size), 0)

    def allow(path, rights):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            rights &= handled if os.path.isdir(path) else handled & FILE_RIGHTS
            rule = rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
            system_call("landlock_add_rule", rules, 1, rule, 0)
        finally:
            os.close(fd)

    for path in SETTINGS["readable"]:
        allow(path, READ_FILE | READ_DIR)
    allow("/dev/null", READ_FILE | WRITE_FILE)
    if place:
        allow(place, handled & ~EXECUTE)
    system_call("landlock_restrict_self", rules, 0)
    os.close(rules)


def drop_capabilities():
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    system_call("capset", header, (ctypes.c_uint32 * 6)())


def filter_calls(program):
    code = bytes.fromhex(program)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    whole = Program(len(code) // 8, code)
    kernel("prctl", PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(whole), ctypes.c_ulong(0), ctypes.c_ulong(0))


class Confinement:
    """What this system grants, found out once by trying it."""

    def __init__(self):
        self.namespaces = False
        self.landlock = 0
        self.filter = None
        # What stays open, and why.
        self.open = []

    def try_namespaces(self):
        """In a child, because some systems grant namespaces without rights in them."""
        why = attempt(lambda: (enter_namespaces(), in_child(lambda: mount_own_files(WORK))))
        self.namespaces = why is None
        return why

    def try_landlock(self):
        try:
            self.landlock = system_call("landlock_create_ruleset", None, ctypes.c_size_t(0), 1)
        except OSError as error:
            return error.strerror
        why = attempt(lambda: (prctl(PR_SET_NO_NEW_PRIVS, 1), lock_files(self.landlock, None)))
        if why is not None:
            self.landlock = 0
        return why

    def try_filter(self):
        wanted = SETTINGS["kernel"]["filter" if self.namespaces else "filter_alone"]
        why = attempt(lambda: (prctl(PR_SET_NO_NEW_PRIVS, 1), filter_calls(wanted)))
        if why is None:
            self.filter = wanted
        return why

    def find(self):
        if LIBC is None:
            why = "this Python has no ctypes"
            self.open = [[what, why] for what in ("files", "network", "processes", "privileges", "system calls")]
            return
        namespaces, landlock, calls = self.try_namespaces(), self.try_landlock(), self.try_filter()
        if landlock:
            self.open.append(["files that may be read" if self.namespaces else "files", landlock])
        if namespaces:
            self.open.append(["disk space", namespaces])
        if calls:
            self.open.append(["system calls", calls])
        if namespaces and calls:
            self.open += [["network", namespaces], ["processes", namespaces]]

    def confine(self, place):
        """Gives up for good what a program under test does not need."""
        os.setsid()
        if LIBC is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            prctl(PR_SET_NO_NEW_PRIVS, 1)
            prctl(PR_SET_DUMPABLE, 0)
            if self.namespaces and place:
                mount_own_files(place)
            if self.landlock:
                lock_files(self.landlock, place)
            drop_capabilities()
        os.chdir(place or "/")
        limits = [
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, SETTINGS["cpu"]),
            (resource.RLIMIT_AS, SETTINGS["memory"]),
            (resource.RLIMIT_FSIZE, SETTINGS["disk"]),
            (resource.RLIMIT_NOFILE, SETTINGS["files"]),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ]
        if self.namespaces:
            # Elsewhere all processes of the user count.
            limits.append((resource.RLIMIT_NPROC, SETTINGS["threads"]))
        for what, limit in limits:
            hard = resource.getrlimit(what)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(what, (limit, limit))
        if self.filter:
            filter_calls(self.filter)
        gc.enable()
        # Forks begin with other random numbers each, unless told otherwise.
        random.seed(0)
        os.environ.clear()
        # It was looked for in another environment.
        tempfile.tempdir = None
        if place:
            os.environ.update(TMPDIR=place, HOME=place)


def in_child(action):
    """Runs an action in a forked process; the first error there is one here."""
    why = attempt(action)
    if why is not None:
        raise OSError(why)


def attempt(action):
    """What goes wrong with an action in a process of its own; None where nothing does."""
    inlet, outlet = os.pipe()
    pid = os.fork()
    if pid == 0:
        why = b""
        try:
            action()
        except BaseException as error:
            why = str(error.strerror or error if isinstance(error, OSError) else error).encode() or b"failed"
        finally:
            write_all(outlet, why)
            os._exit(1 if why else 0)
    os.close(outlet)
    why = read_exactly(inlet, 1 << 12).decode(errors="replace")
    os.close(inlet)
    _, status = os.waitpid(pid, 0)
    return why or (None if status == 0 else "the attempt was killed")


# ------------------------------------------------------------------------------------------------------- candidate


def keep_only(*fds):
    """The given descriptors become 3, 4, ...; of the others stdin alone stays."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.closerange(3, 100)
    for i, fd in enumerate(high):
        os.dup2(fd, 3 + i)
    os.closerange(3 + len(fds), 256)


def close_stdin():
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    if null > 0:
        os.close(null)


def candidate(length, calls, replies, confinement, place):
    keep_only(calls, replies)
    calls, replies = 3, 4
    part = read_exactly(0, length)
    close_stdin()
    if len(part) < length:
        os._exit(1)
    part = json.loads(part)
    confinement.confine(place)
    # The examiner may read its part now. From here on this process is not believed.
    write_all(replies, b"\n")
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    sys.argv[:] = [""]
    code = compile(part["source"], "solution.py", "exec", dont_inherit=True, optimize=0)
    exec(code, module.__dict__)
    function = module.__dict__[part["entry_point"]]
    lines = Lines(calls)
    while True:
        line = lines.next()
        if line is None:
            os._exit(0)
        sent = json.loads(line)
        arguments, named = decode(sent["a"]), decode(sent["k"])
        try:
            reply = {"v": encode(function(*arguments, **named))}
        except Exception as error:
            names = [c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins"]
            try:
                about = [encode(argument) for argument in error.args]
            except Foreign:
                about = []
            reply = {"e": names, "a": about}
        except Foreign as error:
            reply = {"x": str(error)}
        try:
            after = {"a": encode(arguments), "k": encode(named)}
            if after != sent:
                reply["after"] = after
        except Foreign:
            pass
        write_all(replies, json.dumps(reply).encode() + b"\n")


# -------------------------------------------------------------------------------------------------------- examiner


class Wrong(BaseException):
    """The candidate is gone, or says what is no plain data. Not an Exception: no test may catch it."""


class Unfit(BaseException):
    """The exam cannot be given."""


class StandIn:
    """The entry point, as tests see it."""

    def __init__(self, name, calls, replies):
        self.__name__ = self.__qualname__ = name
        self._calls, self._replies = calls, replies
        # How often it was called, and why the response is wrong whatever tests make of it.
        self._count, self._wrong = 0, None

    def _lost(self, why):
        self._wrong = self._wrong or why
        raise Wrong(why)

    def __call__(self, *arguments, **named):
        if self._wrong:
            raise Wrong(self._wrong)
        self._count += 1
        try:
            sent = {"a": encode(list(arguments)), "k": encode(named)}
        except Foreign as error:
            raise Unfit(f"they hand the candidate a value of type {error}, and only plain data can be handed over")
        try:
            write_all(self._calls, json.dumps(sent).encode() + b"\n")
            line = self._replies.next()
        except OSError:
            line = None
        if line is None:
            self._lost("the program ended")
        try:
            reply = json.loads(line)
            after = reply.get("after")
            if after is not None:
                for old, new in zip(arguments, decode(after["a"])):
                    replace(old, new)
                for key, new in decode(after["k"]).items():
                    replace(named[key], new)
            if "v" in reply:
                return decode(reply["v"])
            if "x" in reply:
                self._lost(f"the result is of type {reply['x']}, and only plain data can be handed over")
            error = builtin_error(reply["e"], decode(reply["a"]))
        except Exception as error:
            self._lost(f"the program's reply cannot be read: {error}")
        raise error


def builtin_error(names, about):
    """The nearest of Python's own exceptions, so that tests can expect it."""
    kinds = (getattr(__builtins__, str(name), None) for name in names)
    kind = next(k for k in kinds if isinstance(k, type) and issubclass(k, Exception))
    try:
        error = kind(*about)
    except Exception:
        error = kind.__new__(kind)
    error.of_candidate = True
    return error


def give_exam(part, stand_in):
    """The verdict and why."""
    name = part["entry_point"]
    space = {"__name__": "exam", "__builtins__": __builtins__}
    codes = {}
    for stage in ("setup", "tests"):
        try:
            codes[stage] = compile(part[stage], f"{stage}.py", "exec", dont_inherit=True, optimize=0)
        except Exception as error:
            return "unjudged", f"the {stage}: {type(error).__name__}: {error}"
    stage = "setup"
    try:
        exec(codes["setup"], space)
        stage = "tests"
        space[name] = stand_in
        helper = space.get("check")
        exec(codes["tests"], space)
        check = space.get("check")
        if callable(check) and check is not helper:
            check(stand_in)
    except Unfit as error:
        return "unjudged", f"the tests cannot be given: {error}"
    except Wrong as error:
        return "fail", str(error)
    except AssertionError as error:
        return "fail", f"an assertion failed {error}".strip()
    except (NameError, ImportError) as error:
        if not hasattr(error, "of_candidate"):
            return "unjudged", f"the {stage}: {type(error).__name__}: {error}"
        return "fail", f"{type(error).__name__}: {error}"
    except Exception as error:
        return ("unjudged" if stage == "setup" else "fail"), f"the {stage}: {type(error).__name__}: {error}"
    except BaseException as error:
        return "unjudged", f"the {stage} ended with {type(error).__name__}"
    if stand_in._wrong:
        return "fail", stand_in._wrong
    if not stand_in._count:
        return "unjudged", f"the tests never call {name}"
    return "pass", ""


def examiner(length, calls, replies, verdicts, confinement):
    keep_only(calls, replies, verdicts)
    calls, replies, verdicts = 3, Lines(4), 5
    # The candidate has read its part then. Whatever comes in its place is the candidate's end.
    if replies.next() is None:
        os._exit(1)
    part = read_exactly(0, length)
    close_stdin()
    if len(part) < length:
        os._exit(1)
    write_all(verdicts, b"\n")
    part = json.loads(part)
    confinement.confine(None)
    verdict, why = give_exam(part, StandIn(part["entry_point"], calls, replies))
    write_all(verdicts, json.dumps([verdict, why[:500]]).encode() + b"\n")
    os._exit(0)


# ---------------------------------------------------------------------------------------------------------- warden


def start(function, *arguments):
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
        finally:
            # Whatever happened: the parent's code is not to be run here.
            os._exit(1)
    return pid


def kill(pid):
    for signal_to in (os.kill, os.killpg):
        try:
            signal_to(pid, signal.SIGKILL)
        except OSError:
            pass


def strays():
    """Children of this process: also those that it did not fork, whose parents died before them."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def end_all(pids, confinement):
    """Kills all that a verdict has started, and returns the exit statuses of the two."""
    statuses = {}
    while True:
        if confinement.namespaces:
            # All processes of the namespace but this one, which is its first.
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:
            for pid in {*pids, *strays()} - statuses.keys():
                kill(pid)
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return statuses
        statuses[pid] = status


def remove(place):
    """Removes a directory, however deep, and whatever modes it has: each directory in it moves to a fresh one, where all names
    are numbers of ours."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW

    def is_directory(name, folder):
        if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            return False
        os.chmod(name, 0o700, dir_fd=folder)
        return True

    try:
        if not is_directory(place, None):
            os.unlink(place)
            return
        fresh = tempfile.mkdtemp(prefix="bon-program-", dir=os.path.dirname(place))
        top = os.open(fresh, flags)
        os.rename(place, "0", dst_dir_fd=top)
        last, at = 0, 0
        while at <= last:
            folder = os.open(str(at), flags, dir_fd=top)
            for name in os.listdir(folder):
                if is_directory(name, folder):
                    last += 1
                    os.rename(name, str(last), src_dir_fd=folder, dst_dir_fd=top)
                else:
                    os.unlink(name, dir_fd=folder)
            os.close(folder)
            os.rmdir(str(at), dir_fd=top)
            at += 1
        os.close(top)
        os.rmdir(fresh)
    except OSError as error:
        sys.stderr.write(f"cannot remove {place}: {error}\n")


def judge(confinement, lengths, number):
    """One verdict; None where the engine is gone or the two are out of step with it."""
    calls, replies, verdicts = os.pipe(), os.pipe(), os.pipe()
    place = WORK
    if not confinement.namespaces:
        place = os.path.join(WORK, str(number))
        os.mkdir(place, 0o700)
    # Until both have read their parts, which is before the program runs.
    deadline = time.monotonic() + UNTIL_READ
    one = start(candidate, lengths[0], calls[0], replies[1], confinement, place)
    two = start(examiner, lengths[1], calls[1], replies[0], verdicts[1], confinement)
    for fd in (*calls, *replies, verdicts[1]):
        os.close(fd)
    poller = select.poll()
    poller.register(verdicts[0], select.POLLIN)
    # Nothing but the engine's end: its bytes are for the two.
    poller.register(0, 0)
    said, late, alone = b"", False, False
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            late = True
            break
        ready = dict(poller.poll(left * 1000 + 1))
        if 0 in ready:
            alone = True
            break
        if verdicts[0] in ready:
            part = os.read(verdicts[0], 1 << 12)
            if not part:
                break
            if not said:
                deadline = time.monotonic() + SETTINGS["timeout"]
            said += part
            if said.count(b"\n") == 2:
                break
    statuses = end_all((one, two), confinement)
    os.close(verdicts[0])
    if place != WORK:
        remove(place)
    _, _, verdict = said.partition(b"\n")
    if alone or not said:
        # Parts may be left in stdin.
        return None
    if verdict.endswith(b"\n"):
        return json.loads(verdict)
    if late:
        return "fail", f"more than {SETTINGS['timeout']} s"
    status = statuses[two]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU):
        return "fail", "the tests met a limit"
    return "unjudged", f"the tests ended without a verdict (wait status {status})"


def warden(confinement):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if LIBC is not None:
        if confinement.namespaces:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        else:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        prctl(PR_SET_DUMPABLE, 0)
    write_all(1, json.dumps({"ready": True, "open": confinement.open}).encode() + b"\n")
    gc.collect()
    gc.freeze()
    gc.disable()
    number = 0
    while True:
        header = read_exactly(0, 16)
        if len(header) < 16:
            return
        number += 1
        outcome = judge(confinement, (int(header[:8], 16), int(header[8:], 16)), number)
        if outcome is None:
            return
        verdict, why = outcome
        write_all(1, json.dumps({"verdict": verdict, "why": why}).encode() + b"\n")


def main():
    global WORK
    SETTINGS.update(json.loads(read_exactly(0, int(read_exactly(0, 8), 16))))
    if sys.version_info < (3, 9):
        sys.exit(f"Python 3.9 or newer is needed, this is {sys.version.split()[0]}")
    os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), 1 << 16))
    # Modules are found where the interpreter keeps them, not in the working directory.
    sys.path[:] = [path for path in sys.path if path and os.path.isabs(path)]
    SETTINGS["readable"] = readable()
    WORK = tempfile.mkdtemp(prefix="bon-program-")
    try:
        confinement = Confinement()
        confinement.find()
        if confinement.namespaces:
            enter_namespaces()
            pid = start(warden, confinement)
            os.waitpid(pid, 0)
        else:
            warden(confinement)
    finally:
        remove(WORK)


if __name__ == "__main__":
    main()
