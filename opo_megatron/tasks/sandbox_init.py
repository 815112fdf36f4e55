"""The first process of the Python sandbox: locks itself in, then runs the program from its input.

    unshare … python -I -S sandbox_init.py SECONDS MEMORY_MIB PREFIX

It runs as root of namespaces of its own (`python_sandbox.py`), and imports nothing but the standard library.
Whatever cannot be locked raises, and nothing of the program is run.
"""

from __future__ import annotations

import ast
import ctypes
import os
import platform
import resource
import struct
import sys
import traceback
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 32, 4096, 16384, 1 << 18
MS_READ_ONLY = 1
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR = 442
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 24, 38, 22, 2
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
DEVICES = ("null", "zero", "random", "urandom")
ROOTS = ("/mnt", "/media", "/srv", "/opt", "/tmp", "/var")
"""Folders of which one is hidden by the new root, until that is the root."""
FOLDER_MIB = 64
CLONE_THREAD = 0x10000
EPERM, ENOSYS = 1, 38
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
FORBIDDEN = {
    # architecture: (AUDIT_ARCH, clone, numbers of: fork vfork execve execveat unshare setns ptrace mount
    # umount2 chroot pivot_root keyctl add_key request_key bpf perf_event_open userfaultfd io_uring_setup)
    "x86_64": (
        0xC000003E, 56,
        (57, 58, 59, 322, 272, 308, 101, 165, 166, 161, 155, 250, 248, 249, 321, 298, 323, 425),
    ),
    "aarch64": (
        0xC00000B7, 220, (221, 281, 97, 268, 117, 40, 39, 51, 41, 219, 217, 218, 280, 241, 282, 425),
    ),
}  # fmt: skip
CLONE3 = 435
"""ENOSYS lets the C library take clone, whose flags a filter can read."""


def main() -> None:
    seconds, memory_mib, prefix = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    code = sys.stdin.buffer.read().decode(errors="replace")
    _new_root(prefix)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    _limit(seconds, memory_mib)
    _drop_capabilities()
    _forbid()
    sys.argv = ["-"]
    _run(code)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [None if one is None else one.encode() for one in (source, target, kind)]
    result = LIBC.mount(*arguments, ctypes.c_ulong(flags), None if data is None else data.encode())
    _checked(result, f"mount {target}")


def _new_root(prefix: str) -> None:
    """A root in memory, read-only, with the interpreter, and a folder to write into."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    free = (one for one in ROOTS if os.path.isdir(one) and not f"{prefix}/".startswith(f"{one}/"))
    root = next(free)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in (*SYSTEM, prefix):
        target = root + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path) and not os.path.isdir(target):
            os.makedirs(target)
            _mount(path, target, None, MS_BIND | MS_REC)
            _make_read_only(target)
    os.mkdir(f"{root}/dev")
    for name in DEVICES:
        Path(f"{root}/dev/{name}").touch()
        _mount(f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND)
    os.mkdir(f"{root}/tmp")
    options = f"size={FOLDER_MIB}m,nr_inodes=4096,mode=700"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    _mount("none", root, None, MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV | MS_READ_ONLY)
    os.chroot(root)
    os.chdir("/tmp")


def _make_read_only(path: str) -> None:
    attributes = struct.pack("QQQQ", 1 | 2 | 4, 0, 0, 0)  # read-only, no setuid, no devices
    _checked(
        LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, len(attributes)),
        f"mount_setattr {path}",
    )


def _limit(seconds: float, memory_mib: int) -> None:
    cpu = int(seconds) + 1
    for kind, value in (
        (resource.RLIMIT_AS, memory_mib * 2**20),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, FOLDER_MIB * 2**20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _drop_capabilities() -> None:
    number = 0
    while LIBC.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1
    header = struct.pack("Ii", 0x20080522, 0)
    _checked(LIBC.capset(header, b"\0" * 24), "capset")
    _checked(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def _forbid() -> None:
    """A filter of system calls: no new processes, no further namespaces, nothing that looks into others."""
    if platform.machine() not in FORBIDDEN:
        raise OSError(f"the filter of system calls is not known for {platform.machine()}")
    architecture, clone, forbidden = FORBIDDEN[platform.machine()]
    load, equal, at_least, has_bits, end = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, KILL), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (end, 0, 0, ERRNO | EPERM)]  # x32
    program += [(equal, 0, 1, CLONE3), (end, 0, 0, ERRNO | ENOSYS)]
    for number in forbidden:
        program += [(equal, 0, 1, number), (end, 0, 0, ERRNO | EPERM)]
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (has_bits, 1, 0, CLONE_THREAD)]
    program += [(end, 0, 0, ERRNO | EPERM), (end, 0, 0, ALLOW)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _checked(LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")


def _run(code: str) -> None:
    """Run the program; the value of its last line is shown where that is an expression."""
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        tree = ast.parse(code, "<python>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<python>", "exec"), scope)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<python>", "eval"), scope)
            if value is not None:
                print(value)
    except SystemExit:
        raise
    except BaseException as error:
        sys.stdout.flush()
        inside = error.__traceback__.tb_next if error.__traceback__ else None
        sys.stderr.write("".join(traceback.format_exception(type(error), error, inside)))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        print(f"Error: the sandbox cannot be made: {error}")
