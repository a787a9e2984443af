"""Speed and exactness of the search's solver beside Puzzletron's, on one thread: `make bench-search OUT=FILE`.

Both get the same tables of 80 layers x 54 options under three limits in memory, and are timed in CPU seconds from there
to the answer, each in a process of its own; imports do not count. Puzzletron's solver is `run_mip` of nvidia-modelopt
0.47, with the CBC that PuLP brings; `puzzletron.py` says how it is made to run here.

Rows: `value` is ours, `versus` what it is compared with, `ratio` versus / value, or what the name says.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import highspy  # noqa: F401  loaded here, so that its loading is not timed

from components.search.solver.certificate import check
from components.search.solver.problem import Problem
from components.search.solver.score_file import LayerTable
from components.search.solver.solve import Solution, certify, pool, solve_problem
from tests.bench import library, quality, score
from tests.bench.environment import environment
from tests.bench.growth import Growth, plot_growths
from tests.bench.instances import Limits, Table, independent, layered, with_scores_times
from tests.bench.rows import tell

PEER = ("nvidia-modelopt==0.47.0", "pulp==3.3.2")
SEEDS = range(5)
TIGHT = 4
NUM_LAYERS, MANY_LAYERS = 80, 126
FACTORS = (1e-2, 1e-4)
GROWTHS = {"layers": (10, 20, 40, 80, 160), "options": (6, 12, 24, 54, 108)}
GROWTH_SEEDS = range(3)
POOL_SIZE, POOL_DISTANCE, POOL_LIMIT_S = 16, 2, 10.0
FAMILIES = {"layered": layered, "independent": independent}

Row = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    out = Path(sys.argv[1])
    peer = environment("puzzletron", *PEER)
    rows: list[Row] = []
    for family, make in FAMILIES.items():
        for row in measure(family, make, peer):
            rows.append(row)
            tell(f"{row['name']}: {row['value']} {row['unit']} versus {row['versus']}")
    rows += growth(peer, Path(__file__).with_name("mip.svg"))
    rows += score.measure()
    rows += library.measure()
    rows += quality.measure()
    out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(family: str, make: Any, peer: Path) -> list[Row]:
    """All rows of one family of instances."""
    rows: list[Row] = []
    ours_s, theirs_s = [], []
    for seed in SEEDS:
        table, limits = make(seed, NUM_LAYERS, tight=seed == TIGHT)
        solution, seconds = solve(table, limits)
        answer = puzzletron(peer, table, limits)
        ours_s.append(seconds)
        theirs_s.append(answer["cpu_s"])
        name = f"mip/{family}/seed {seed}{', tight' if seed == TIGHT else ''}"
        rows.append(row(f"{name}: CPU seconds", seconds, "s", answer["cpu_s"]))
        rows += exactness(name, table, limits, solution, answer)
        for factor in FACTORS:
            small = with_scores_times(table, factor)
            scaled, seconds = solve(small, limits)
            answer = puzzletron(peer, small, limits)
            rows.append(row(f"{name}, scores x {factor:g}: CPU seconds", seconds, "s", answer["cpu_s"]))
            rows += exactness(f"{name}, scores x {factor:g}", small, limits, scaled, answer)
            same = float(scaled.choice == solution.choice)
            rows.append(row(f"{name}, scores x {factor:g}: same choice", same, "of 1", 1.0))
    rows.append(row(f"mip/{family}/median: CPU seconds", *medians(ours_s, theirs_s)))
    many_s = [solve(*make(seed, MANY_LAYERS, tight=seed == TIGHT))[1] for seed in SEEDS]
    rows.append(row(f"mip/{family}/{MANY_LAYERS} layers, versus {NUM_LAYERS}: CPU seconds", *medians(many_s, ours_s)))
    for seed in SEEDS:
        table, limits = make(seed, NUM_LAYERS, tight=seed == TIGHT)
        problem = LayerTable.model_validate(table).problem(limits)
        began, began_cpu = time.perf_counter(), time.process_time()
        found = pool(problem, POOL_SIZE, distance=POOL_DISTANCE)
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        name = f"mip/{family}/seed {seed}, {POOL_SIZE} solutions that differ in {POOL_DISTANCE} layers"
        rows.append(row(f"{name}: seconds, versus the target", wall_s, "s", POOL_LIMIT_S))
        rows.append(row(f"{name}: CPU seconds, versus the target", cpu_s, "s", POOL_LIMIT_S))
        proven = sum(solution.status == "optimal" for solution in found)
        rows.append(row(f"{name}: proven", float(proven), "solutions", float(POOL_SIZE)))
    return rows


def growth(peer: Path, plot: Path) -> list[Row]:
    """CPU seconds over layers and over options, medians of a few seeds, and a plot of them."""
    rows: list[Row] = []
    growths = []
    for what, sizes in GROWTHS.items():
        ours, theirs = [], []
        for size in sizes:
            instances = [
                independent(seed, size) if what == "layers" else independent(seed, NUM_LAYERS, num_options=size)
                for seed in GROWTH_SEEDS
            ]
            found = medians(
                [solve(*instance)[1] for instance in instances],
                [puzzletron(peer, *instance)["cpu_s"] for instance in instances],
            )
            rows.append(row(f"mip/independent/growth with {what}: {size}: CPU seconds", *found))
            ours.append(found[0])
            theirs.append(found[2])
        growths.append(Growth(what, sizes, ours, theirs))
    plot_growths(plot, growths, "Puzzletron")
    return rows


def solve(table: Table, limits: Limits) -> tuple[Solution, float]:
    """Our answer, and CPU seconds from lists of numbers to it."""
    layers = table["layers"]
    began = time.process_time()
    scores = [[option["score"] for option in layer["options"]] for layer in layers]
    costs = {name: [[option["costs"][name] for option in layer["options"]] for layer in layers] for name in limits}
    solution = solve_problem(Problem.of(scores, costs, limits))
    seconds = time.process_time() - began
    if solution is None:
        raise SystemExit("an instance has no solution")
    return solution, seconds


def exactness(name: str, table: Table, limits: Limits, solution: Solution, answer: dict[str, Any]) -> list[Row]:
    """How good the answers are, exactly; and whether the proof of ours holds without the solver."""
    layers = LayerTable.model_validate(table)
    problem = layers.problem(limits)
    ours, theirs = problem.objective(solution.choice), problem.objective(tuple(answer["choice"]))
    certificate = certify(problem, solution.choice)
    gap = check(layers.scores, {cost: layers.costs(cost) for cost in limits}, certificate)
    excess = max(
        Fraction(0),
        *(
            (used - room) / room
            for used, room in zip(problem.used(tuple(answer["choice"])), problem.slacks, strict=True)
        ),
    )
    return [
        row(f"{name}: objective", float(ours), "score", float(theirs)),
        row(f"{name}: objective below Puzzletron's", float((theirs - ours) / theirs), "share", 0.0),
        row(f"{name}: gap the solver reports", solution.gap, "share", 0.0),
        row(f"{name}: gap the proof leaves ({len(certificate.nodes)} nodes)", float(gap), "share", 0.0),
        row(f"{name}: excess of Puzzletron's choice over a limit", float(excess), "share", 0.0),
    ]


def puzzletron(python: Path, table: Table, limits: Limits) -> dict[str, Any]:
    """Puzzletron's answer, and its CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        path.write_text(json.dumps({**table, "limits": limits}), encoding="utf-8")
        program = Path(__file__).with_name("puzzletron.py")
        command = [python, program, path]
        environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def medians(ours: list[float], versus: list[float]) -> tuple[float, str, float]:
    """Two medians of seconds."""
    return statistics.median(ours), "s", statistics.median(versus)


def row(name: str, value: float, unit: str, versus: float) -> Row:
    """One line of the result; the ratio says how many times less ours is, None where it would divide by 0."""
    return {"name": name, "value": value, "unit": unit, "versus": versus, "ratio": versus / value if value else None}


if __name__ == "__main__":
    main()
