"""The one rule for names of runs: they are folders of a store, labels of pods, and arguments of commands."""

import re

from components.core.base.errors import InputError

RUN_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""What Kubernetes takes as the value of a label; no such text leaves its folder."""
RESERVED = ("latest", "rebuild")
"""Words that stand for something else where a command takes the name of a run."""


def check_run_name(name: str) -> str:
    """Return the name of a run.

    Raises:
        InputError: no run can have this name.
    """
    if name in RESERVED:
        raise InputError(f"no run can be called {name!r}, which has a meaning of its own", hint="choose another name")
    if RUN_NAME.fullmatch(name) is None:
        shown = name if len(name) <= 80 else f"{name[:60]}… ({len(name)} characters)"
        raise InputError(
            f"no run can be called {shown!r}",
            hint="use 1 to 63 of the characters A-Z, a-z, 0-9, '.', '_' and '-'; begin and end with a letter or digit",
        )
    return name
