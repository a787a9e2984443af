"""Export of a search for other programs: its JSON documents, and one CSV file for each table in them."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from components.core.base.flat_values import flatten

Row = Mapping[str, Any]


def export_search(search: Mapping[str, Any], costs: Mapping[str, Any] | None, folder: Path) -> list[Path]:
    """Write the files.

    Args:
        search: `search.json`.
        costs: `costs.json`; None where the run has none.
        folder: created; files of these names are replaced.

    Returns:
        Paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [_json(folder / "search.json", search)]
    tables: dict[str, Iterable[Row]] = {
        "options": _options(search),
        "choices": _choices(search),
        "fronts": _fronts(search),
        "margins": search.get("margins", ()),
        "dependencies": _dependencies(search),
        "candidates": search.get("candidates", ()),
        "rounds": search.get("latency_feedback", ()),
        "importance": search["importance"],
    }
    if costs is not None:
        written.append(_json(folder / "costs.json", costs))
        tables["measured"] = costs["models"]
    for name, rows in tables.items():
        if found := list(rows):
            written.append(write_csv(folder / f"{name}.csv", found))
    return written


def _options(search: Mapping[str, Any]) -> Iterator[Row]:
    """Every option of every slot, and whether the child uses it."""
    trained = {(block["layer"], block["part"], block["size"]): block for block in search["blocks"]}
    for slot, chosen in zip(search["slots"], search["child"]["choice"], strict=True):
        for number, option in enumerate(slot["options"]):
            block = trained.get((slot["layer"], slot["part"], option["size"]), {})
            more = {key: value for key, value in block.items() if key not in ("layer", "part", "size")}
            place = {"layer": slot["layer"], "part": slot["part"], "option": option["name"], "chosen": number == chosen}
            yield {**place, "score": option["score"], **option["costs"], **more}


def _choices(search: Mapping[str, Any]) -> Iterator[Row]:
    """Parent, child and baselines, then the limits."""
    yield {"choice": "parent", "score": 0.0, "within_limits": True, **search["parent"]}
    found = {"child": search["child"], "greedy": search["greedy_child"], "random": search["random_child"]}
    for name, choice in {**found, **search.get("baselines", {})}.items():
        yield {
            "choice": name,
            "score": choice["score"],
            "within_limits": choice["within_limits"],
            **choice["costs"],
            "options": choice["choice"],
        }
    yield {"choice": "limit", **search["limits"]}


def _fronts(search: Mapping[str, Any]) -> Iterator[Row]:
    """Best score at each limit of each resource."""
    latency = [{**point, "limit": point["limit_ms"]} for point in search["pareto"]]
    for resource, points in {"latency_ms": latency, **search.get("fronts", {})}.items():
        for point in points:
            place = {"resource": resource, "limit": point["limit"], "score": point["score"]}
            yield {**place, **point["costs"], "options": point["choice"]}


def _dependencies(search: Mapping[str, Any]) -> Iterator[Row]:
    """Dependency of the second on the first, for each two FFNs of a run."""
    for run in (search.get("fusion") or {}).get("runs", ()):
        for row, first in enumerate(run["layers"]):
            for column in range(row + 1, len(run["layers"])):
                pair = {"removed": first, "ffn": run["layers"][column]}
                fused = any({first, pair["ffn"]} <= set(group) for group in run["groups"])
                yield {**pair, "cosine_distance": run["dependency"][row][column], "fused": fused}


def _json(path: Path, document: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def write_csv(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows with a column for each key; nested records become dotted columns, lists become JSON."""
    flat = list(map(flatten, rows))
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return path
