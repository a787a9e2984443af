"""`tessera search` on tables of one's own and on runs: answers, exit codes, and that it needs no torch."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.core.model.architecture import Architecture, BlockConfig
from components.core.store.store import open_store
from components.search.config import Limits, Measurement
from components.search.search_table import SearchTable
from components.search.solver.explain import explain_layer
from components.search.solver.solve import certify, solve_table
from pipelines.cli import run_command
from tests.pipelines.made_up_run import COSTS, SEARCH, SHAPE, make_run


def option(name: str, score: float, size: float, ms: float) -> dict[str, Any]:
    return {"name": name, "score": score, "costs": {"size": size, "ms": ms}}


LAYERS = [
    {"options": [option("full", 0, 10, 0.3), option("none", 0.7, 0, 0)]},
    {"options": [option("full", 0, 10, 0.2), option("half", 0.1, 5, 0.1)]},
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"layers": LAYERS, "measured": "by hand"}))
    return path


def solve(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    assert run_command(["search", "solve", *map(str, arguments), "--json"]) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert answer.pop("seconds") >= 0
    return answer


def test_the_best_choice_within_limits_that_are_met_with_equality(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert solve(capsys, table, "--limit", "ms=0.4", "--limit", "size=15") == {
        "status": "optimal",
        "objective": 0.1,
        "bound": 0.1,
        "gap": 0.0,
        "choice": [0, 1],
        "costs": {"size": 15, "ms": 0.4},
    }


def test_a_pool_lists_the_next_best_too(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = solve(capsys, table, "--pool", 9)
    assert [found["choice"] for found in answer["pool"]] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    answer = solve(capsys, table, "--pool", 9, "--distance", 2)
    assert [found["choice"] for found in answer["pool"]] == [[0, 0], [1, 1]]


def test_fixed_layers_stay(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert solve(capsys, table, "--fix", "0=1", "--limit", "size=10")["choice"] == [1, 0]


def test_infeasible_names_the_limits_and_what_can_be_reached(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = solve(capsys, table, "--limit", "ms=0.05", "--limit", "size=100", code=1)
    assert answer == {"status": "infeasible", "conflict": ["ms"], "best": {"ms": 0.1}}
    assert run_command(["search", "solve", str(table), "--limit", "ms=0.05"]) == 1
    assert "no choice meets ms 0.05 (at best 0.1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TABLE", "--limit", "watts=3"], "a limit names the cost 'watts', but option 0 ('full') of layer 0"),
        (["TABLE", "--limit", "ms"], "--limit 'ms' is not of the form NAME=VALUE"),
        (["TABLE", "--limit", "ms=nan"], "with a finite number"),
        (["TABLE", "--fix", "5=0"], "the table has no such layer or option"),
        (["absent.json"], "absent.json cannot be read: No such file"),
        (["no.json"], "no.json is no table of layers: Invalid JSON"),
        (["empty.json"], "layers: Tuple should have at least 1 item"),
        (["text.json"], "layers.0.options.0.score: Input should be a valid number"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(
    arguments: list[str],
    message: str,
    table: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(table.parent)
    Path("no.json").write_text("{layers")
    Path("empty.json").write_text('{"layers": []}')
    Path("text.json").write_text('{"layers": [{"options": [{"name": "a", "score": "1", "costs": {}}]}]}')
    assert run_command(["search", "solve", *(str(table) if word == "TABLE" else word for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_certificate_is_checked_against_its_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof = table.parent / "proof.json"
    solve(capsys, table, "--limit", "size=15", "--certificate", proof)
    assert run_command(["search", "check", str(table), str(proof), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["certified"], answer["objective"], answer["gap"], answer["choice"]) == ("optimal", 0.1, 0.0, [0, 1])
    other = json.loads(table.read_text())
    other["layers"][0]["options"][1]["score"] = 0.05
    table.write_text(json.dumps(other))
    assert run_command(["search", "check", str(table), str(proof)]) == 1
    assert "WrongCertificate" in capsys.readouterr().err


def test_neither_torch_nor_the_solver_is_needed_to_check(table: Path) -> None:
    code = "import sys; from pipelines.cli import run_command; code = run_command(sys.argv[1:])"
    solving = [code + "; assert 'torch' not in sys.modules and code == 0", "search", "solve", str(table)]
    proof = str(table.parent / "proof.json")
    subprocess.run([sys.executable, "-c", *solving, "--certificate", proof], check=True, capture_output=True)
    checking = [code + "; assert 'highspy' not in sys.modules and code == 0", "search", "check", str(table), proof]
    subprocess.run([sys.executable, "-c", *checking], check=True, capture_output=True)


def swept(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> list[dict[str, Any]]:
    assert run_command(["search", "sweep", *map(str, arguments), "--json"]) == code
    points: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["points"]
    return points


def test_a_sweep_solves_at_every_limit_and_writes_all_of_it(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "front.csv"
    points = swept(capsys, table, "--limit", "ms=0..0.4", "--points", 5, "--limit", "size=15", "--csv", rows)
    assert [point["limit"] for point in points] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    for point in points:
        limits = ["--limit", f"ms={point['limit']}", "--limit", "size=15"]
        feasible = point["status"] != "infeasible"
        alone = solve(capsys, table, *limits, code=0 if feasible else 1)
        assert not feasible or {name: point[name] for name in alone} == alone
    assert [point.get("objective") for point in points] == [None, 0.8, 0.7, 0.7, 0.1]
    with rows.open(newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [row["choice"] for row in written] == ["", "none half", "none full", "none full", "full half"]
    assert float(written[-1]["ms"]) == pytest.approx(0.4)
    assert swept(capsys, table, "--limit", "ms=0..0.05", "--points", 2, code=1)[1] == {
        "limit": 0.05,
        "status": "infeasible",
    }


def test_a_sweep_of_a_run_keeps_its_other_limits_and_takes_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, found = searched(tmp_path)
    points = swept(capsys, path, "--limit", "parameters=70%..100%", "--points", 4)
    assert points[-1]["objective"] == pytest.approx(found.child.score)
    for point, share in zip(points, (0.7, 0.8, 0.9, 1.0), strict=True):
        assert point["limit"] == pytest.approx(share * found.parent.parameters)
        assert point["costs"]["parameters"] <= point["limit"]
        assert point["costs"]["latency_ms"] <= found.limits["latency_ms"] * 1.000001
        options, solution = solve_table(
            found.model_dump(mode="json"), Limits(parameters=f"{100 * share}%", latency_ms=found.limits["latency_ms"])
        )
        assert point["objective"] == pytest.approx(solution.objective)
        assert point["names"] == [s.options[p].name for s, p in zip(options.slots, solution.choice, strict=True)]
    assert run_command(["search", "sweep", str(path), "--limit", "latency_ms=40%..100%", "--points", "3"]) == 0
    assert "limit latency_ms" in capsys.readouterr().out


def test_batches_are_swept_outside_and_the_best_of_them_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "search.json"
    shape = Architecture(
        family="llama",
        **SHAPE,
        blocks=(BlockConfig(num_key_value_heads=4, intermediate_size=256),) * 12,
    )
    load = Measurement(batch_size=32, dtype="bfloat16", device="H100")
    path.write_text(SEARCH.model_copy(update={"architecture": shape, "measurement": load}).model_dump_json())
    limits = ["--limit", "tokens_per_s=20000..80000", "--points", "3", "--limit", "memory_bytes=40000000"]
    points = swept(capsys, path, *limits, "--batch", "8,32,64")
    assert [point["batch"] for point in points] == [8] * 3 + [32] * 3 + [64] * 3
    for column in range(3):
        at_limit = points[column::3]
        objectives = [point.get("objective", float("inf")) for point in at_limit]
        assert [point["best"] for point in at_limit] == [
            score == min(objectives) and score < float("inf") for score in objectives
        ]
        for point in at_limit:
            if "costs" in point:
                assert point["costs"]["tokens_per_s"] >= point["limit"] * 0.999999
                assert point["costs"]["memory_bytes"] <= 40_000_000
    assert sum(point["best"] for point in points) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "ms=0..1", "--batch", "8"], "--batch is for runs"),
        (["--limit", "ms=0.3"], "0 limits are swept"),
        (["--limit", "ms=2..1"], "not of the form NAME=LOW..HIGH"),
        (["--limit", "ms=10%..90"], "both numbers or both shares"),
        (["--limit", "ms=10%..90%"], "no parent to take a share of"),
        (["--limit", "weight=0..1"], "does not have it"),
    ],
)
def test_what_cannot_be_swept_is_an_error(
    table: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_command(["search", "sweep", str(table), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_search_is_not_swept_over_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = searched(tmp_path)
    for arguments, message in (
        (["--limit", "tokens_per_s=1..2"], "do not know tokens_per_s"),
        (["--limit", "speed=1..2"], "a search has no cost 'speed'"),
        (["--limit", "parameters=1..2", "--batch", "8"], "has no measurement or architecture"),
        (["--limit", "parameters=1..2", "--batch", "8,x"], "not a list of batch sizes"),
    ):
        assert run_command(["search", "sweep", str(path), *arguments]) == 2
        assert message in capsys.readouterr().err


def searched(tmp_path: Path) -> tuple[Path, SearchTable]:
    path = tmp_path / "search.json"
    path.write_text(SEARCH.model_dump_json())
    return path, SEARCH


def test_explain_says_what_every_other_option_would_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, found = searched(tmp_path)
    assert run_command(["search", "explain", str(path), "--layer", "1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [slot["part"] for slot in answer["slots"]] == ["attention", "ffn"]
    for slot in answer["slots"]:
        best, *others = slot["alternatives"]
        assert best["chosen"]
        assert best["option"] == slot["chosen"]
        assert best["difference"] == 0
        assert all(other["difference"] is None or other["difference"] >= 0 for other in others)
        assert all(
            other["costs"] is None or other["costs"]["latency_ms"] <= found.limits["latency_ms"] * 1.000001
            for other in others
        )
    assert run_command(["search", "explain", str(path), "--layer", "1"]) == 0
    assert "attention of layer 1" in capsys.readouterr().out
    assert run_command(["search", "explain", str(path), "--layer", "99"]) == 2
    assert "the parent has no layer 99" in capsys.readouterr().err


def test_explain_says_what_lies_within_the_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, found = searched(tmp_path)
    known = {margin.within_noise: margin for margin in found.margins if margin.within_noise is not None}
    assert set(known) == {True, False}
    for within, margin in known.items():
        assert run_command(["search", "explain", str(path), "--layer", str(margin.layer)]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"the next best is {margin.following}: {margin.difference:.4g} ± {margin.error:.2g} nats" in text
        assert run_command(["search", "explain", str(path), "--layer", str(margin.layer), "--json"]) == 0
        slots = json.loads(capsys.readouterr().out)["slots"]
        slot = next(slot for slot in slots if slot["part"] == margin.part)
        alternatives = {other["option"]: other for other in slot["alternatives"]}
        assert alternatives[margin.following]["difference"] == pytest.approx(margin.difference)
        assert (alternatives[margin.following]["error"], alternatives[margin.following]["within_noise"]) == (
            margin.error,
            within,
        )
        assert [name for name, other in alternatives.items() if other["error"] is not None] == [margin.following]
        assert ("within the noise" in slot["reason"]) == within


def test_the_certificate_of_a_search_is_checked_against_its_own_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = certify(SEARCH.problem(SEARCH.scores, SEARCH.limits), SEARCH.child.choice)
    path = tmp_path / "search.json"
    path.write_text(SEARCH.model_copy(update={"certificate": proof}).model_dump_json())
    assert run_command(["search", "check", str(path)]) == 0
    assert "the choice is the best within its limits" in capsys.readouterr().out
    changed = json.loads(path.read_text())
    changed["fixed"]["latency_ms"] += 1.0
    path.write_text(json.dumps(changed))
    assert run_command(["search", "check", str(path)]) == 1
    assert "the choice exceeds a limit" in capsys.readouterr().err
    path.write_text(SEARCH.model_dump_json())
    assert run_command(["search", "check", str(path)]) == 2
    assert "has no certificate" in capsys.readouterr().err


def test_all_that_a_search_knows_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(tmp_path / "store")
    make_run(store)
    arguments = ["search", "export", "latest", str(tmp_path / "out"), "--store", str(tmp_path / "store"), "--json"]
    assert run_command(arguments) == 0
    written = [Path(path) for path in json.loads(capsys.readouterr().out)]
    assert SearchTable.model_validate_json((tmp_path / "out" / "search.json").read_text()) == SEARCH

    def read(name: str) -> list[dict[str, str]]:
        with (tmp_path / "out" / f"{name}.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))

    tables = {path.stem: read(path.stem) for path in written if path.suffix == ".csv"}
    exported = {"options", "choices", "fronts", "margins", "dependencies", "candidates", "rounds", "measured"}
    assert set(tables) == exported
    assert [row["within_noise"] for row in tables["margins"]] == [
        "" if margin.within_noise is None else str(margin.within_noise) for margin in SEARCH.margins
    ]
    chosen = [row["option"] for row in tables["options"] if row["chosen"] == "True"]
    assert chosen == [slot.options[pick].name for slot, pick in zip(SEARCH.slots, SEARCH.child.choice, strict=True)]
    assert sum(float(row["score"]) for row in tables["options"] if row["chosen"] == "True") == pytest.approx(
        SEARCH.child.score
    )
    names = ["parent", "child", "greedy", "random", *SEARCH.baselines, "limit"]
    assert [row["choice"] for row in tables["choices"]] == names
    assert [float(row["limit"]) for row in tables["fronts"] if row["resource"] == "latency_ms"] == [
        point.limit_ms for point in SEARCH.pareto
    ]
    assert [float(row["median_ms"]) for row in tables["measured"]] == [model.median_ms for model in COSTS.models]


def test_a_child_that_is_not_the_best_by_score_is_explained_too() -> None:
    other = SEARCH.candidates[1].choice
    slot = next(k for k, (a, b) in enumerate(zip(other, SEARCH.best_choice, strict=True)) if a != b)
    reasons = explain_layer(SEARCH, SEARCH.limits, other, SEARCH.slots[slot].layer)
    explained = next(reason for reason in reasons if reason.part == SEARCH.slots[slot].part)
    assert "a short distillation of several candidates chose this child" in explained.reason
