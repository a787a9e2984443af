"""Finds the cause of a failure in the log of vLLM, whose last lines only say that its engine did not start."""

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

TAIL_LINES = 15
MAX_CAUSES, MAX_DETAILS = 3, 3
PREFIX = re.compile(r"^\([^)]*pid=\d+\) (?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
"""Process, level, time and place, which vLLM writes before each line."""
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception)(?::|$)")
CONSEQUENCE = "See root cause above"


def describe_failure(log: Path) -> str:
    """The exceptions in a log, and its last lines."""
    return describe_lines(log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else [])


def describe_lines(lines: Sequence[str]) -> str:
    """The same for the lines of a log."""
    found = causes(lines)
    last = lines[-TAIL_LINES:]
    return "\n".join([*(cause for cause in found if cause not in "\n".join(last)), *last])


def causes(lines: Sequence[str]) -> list[str]:
    """The last exceptions of a log, each once, with the indented lines that explain it."""
    plain = [PREFIX.sub("", line) for line in lines]
    found: dict[str, None] = {}
    for number, line in enumerate(plain):
        if EXCEPTION.match(line) and CONSEQUENCE not in line:
            after = plain[number + 1 : number + 1 + MAX_DETAILS]
            found["\n".join([line, *takewhile(lambda text: text.startswith(" "), after)])] = None
    return list(found)[-MAX_CAUSES:]
