"""How processes are ended, and the peak of a process and of what it starts, in processes of their own."""

import gc
import subprocess
import sys
from pathlib import Path

from components.core.base.processes import end_trees, without_garbage_collection
from tests.waiting import PATIENCE_S, wait_until

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


SAVES = """
import pathlib, signal, subprocess, sys
folder = pathlib.Path(sys.argv[1])
asked = signal.SIGTERM, signal.SIGINT
signal.pthread_sigmask(signal.SIG_BLOCK, asked)
child = subprocess.Popen(["sleep", "600"])
(folder / "child").write_text(str(child.pid))
(folder / "ready").touch()
signal.sigwait(asked)
again = signal.sigtimedwait(asked, 0.5)
(folder / "asked").write_text("once" if again is None else "twice")
"""


def test_garbage_is_collected_again_after_the_imports() -> None:
    with without_garbage_collection():
        assert not gc.isenabled()
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_each_of_several_processes_is_asked_once_and_saves_and_what_it_started_is_ended(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    processes = []
    for folder in folders:
        folder.mkdir()
        processes.append(subprocess.Popen([sys.executable, "-c", SAVES, str(folder)], start_new_session=True))
    wait_until("both are ready", lambda: all((folder / "ready").exists() for folder in folders))
    end_trees(processes, PATIENCE_S)
    assert [process.returncode for process in processes] == [0, 0]
    assert [(folder / "asked").read_text() for folder in folders] == ["once", "once"]
    assert not any(Path("/proc", (folder / "child").read_text()).exists() for folder in folders)
