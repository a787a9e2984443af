"""A folder store on a file system without hard links: the kernel refuses them to a process of its own."""

import platform
import subprocess
import sys

import pytest

NO_LINKS = """
import ctypes, os, struct, sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER, EPERM = 38, 22, 2, 1
LOAD, EQUAL, RETURN, ALLOW, REFUSE = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000

def refuse(*calls):
    \"\"\"Have these system calls fail with EPERM from now on, whatever library makes them.\"\"\"
    steps = [(LOAD, 0, 0, 0)]
    steps += [(EQUAL, len(calls) - n, 0, call) for n, call in enumerate(calls)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE | EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, FILTER, program, 0, 0):
        sys.exit(77)  # not allowed here

from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from components.core.store.store import open_store
from components.core.store.garbage_collection import collect_garbage
from components.core.store.verification import find_faults

root = Path(sys.argv[1])
refuse(*map(int, sys.argv[2:]))
(root / "source").mkdir()
(root / "source" / "a").write_text("a")
try:
    os.link(root / "source" / "a", root / "link")
except PermissionError:
    pass
else:
    raise AssertionError("links are not refused")

store = open_store(root / "store")
digest = store.put_folder(root / "source", "data").digest
assert (store.fetch(digest) / "a").read_text() == "a"
assert store.claim("runs/one/run.json", {"run": "one", "sources": {"data": digest}})
assert not store.claim("runs/one/run.json", {"run": "two"})
assert store.document("runs/one/run.json")["run"] == "one"

def claim(number):
    return open_store(root / "store").claim("runs/two/run.json", {"number": number})

with ThreadPoolExecutor(8) as pool:
    won = list(pool.map(claim, range(40)))
assert store.document("runs/two/run.json")["number"] == won.index(True) and sum(won) == 1
collect_garbage(store, grace_s=-5.0)
assert find_faults(store) == {}
print("done")
"""
CALLS = {"x86_64": ("86", "265"), "aarch64": ("37",)}
"""Numbers of `link` and `linkat`."""


def test_a_store_needs_no_hard_links(tmp_path):
    if sys.platform != "linux" or platform.machine() not in CALLS:
        pytest.skip("system calls are refused on Linux alone")
    command = [sys.executable, "-c", NO_LINKS, str(tmp_path), *CALLS[platform.machine()]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this machine lets no process refuse system calls to itself")
    assert done.stdout == "done\n", done.stderr
