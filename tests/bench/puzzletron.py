"""Puzzletron's own solver on a table of layers; runs in an environment of its own, see `environment.py`.

The shim, all of it: importing `modelopt.torch.puzzletron` loads all of ModelOpt and needs torch, CUDA helpers and
Transformers, none of which its solver uses. So the packages above the solver are put in place empty, with their folders
as search paths; the solver's two files are loaded as they were installed, unchanged. What they print goes nowhere.

usage: python puzzletron.py TABLE.json, where the table also has `limits`; prints {"objective", "choice", "cpu_s"}
"""

import contextlib
import importlib
import importlib.util
import json
import os
import resource
import sys
import types
from pathlib import Path
from typing import Any

PACKAGES = ("modelopt", "modelopt.torch", "modelopt.torch.puzzletron", "modelopt.torch.puzzletron.mip")


def load_run_mip() -> Any:
    """`run_mip` of the installed ModelOpt."""
    spec = importlib.util.find_spec("modelopt")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    for name in PACKAGES:
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    return importlib.import_module(f"{PACKAGES[-1]}.mip_with_multi_layer_replacements").run_mip


def cpu_s() -> float:
    """CPU seconds of this process and of the solver that it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    """Solve the table named on the command line."""
    table = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run_mip = load_run_mip()
    replacements = {
        f"{layer}/{option}": {
            "parent_layer_indices": [layer],
            "option": option,
            "metrics": {"score": values["score"]},
            "stats": values["costs"],
        }
        for layer, options in enumerate(table["layers"])
        for option, values in enumerate(options["options"])
    }
    constraints = {f"stats.{name}": limit for name, limit in table["limits"].items()}
    out = os.dup(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 1)
        before = cpu_s()
        solutions = run_mip(replacements, "metrics.score", constraints, bigger_is_better=False)
        used = cpu_s() - before
    os.dup2(out, 1)
    if not solutions:
        raise SystemExit("Puzzletron found no solution")
    chosen = solutions[0]["chosen_replacements"]
    answer = {
        "objective": solutions[0]["total_value"],
        "choice": [replacement["option"] for replacement in chosen],
        "cpu_s": used,
    }
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
