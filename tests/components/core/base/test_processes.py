"""The peak of a process and of what it starts, in processes of their own."""

import subprocess
import sys

MIB = 1 << 20
PROBE = """
import subprocess, sys
from components.core.base.processes import peak_resident_bytes
first = peak_resident_bytes()
bytearray(b"x" * int(sys.argv[1]))  # twice that, and given back
own = peak_resident_bytes()
subprocess.run([sys.executable, "-c", f"bytearray(b'x' * {sys.argv[2]})"])
print(first, own, peak_resident_bytes())
"""


def peaks(own_bytes: int, child_bytes: int) -> list[int]:
    command = [sys.executable, "-c", PROBE, str(own_bytes), str(child_bytes)]
    return [int(text) for text in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


def test_what_was_given_back_and_what_another_process_had_counts() -> None:
    first, own, with_child = peaks(32 * MIB, 128 * MIB)
    assert first < 64 * MIB  # and not what the process of this test has
    assert 64 * MIB <= own < first + 80 * MIB
    assert 256 * MIB <= with_child < 256 * MIB + first
