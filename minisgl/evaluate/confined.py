"""A program that runs another one with limits: `python -I confined.py PROGRAM SECONDS MIB`, in an empty folder.

Limits hold for the program and whatever it starts: processor time, memory, size of files, open files, and, where the
system lets an ordinary user make one, a network of its own with nothing in it. Imports only the standard library, since
it runs isolated from any package. A wall-clock limit is the parent's to keep.
"""

import ctypes
import os
import resource
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
MAX_FILE_BYTES, MAX_FILES = 1 << 20, 64


def confine(seconds: int, mebibytes: int) -> None:
    """Set the limits for this process and what it becomes."""
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, mebibytes << 20),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    if sys.platform == "linux":
        # Not allowed in many containers; the result says nothing then, since the other limits stand.
        ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET)


if __name__ == "__main__":
    program, seconds, mebibytes = sys.argv[1:]
    confine(int(seconds), int(mebibytes))
    os.execv(sys.executable, [sys.executable, "-I", program])
