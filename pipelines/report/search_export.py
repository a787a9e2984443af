"""Export of a search for other programs: its JSON documents, and one CSV file for each table in them."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


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
    tables: dict[str, Iterator[Row]] = {
        "options": _options(search),
        "choices": _choices(search),
        "fronts": _fronts(search),
        "margins": _records(search.get("margins", ())),
        "dependencies": _dependencies(search),
        "candidates": _records(search.get("candidates", ())),
        "rounds": _records(search.get("latency_feedback", ())),
        "importance": _records(search["importance"]),
    }
    if costs is not None:
        written.append(_json(folder / "costs.json", costs))
        tables["measured"] = _records(costs["models"])
    for name, rows in tables.items():
        found = list(rows)
        if found:
            written.append(_csv(folder / f"{name}.csv", found))
    return written


def _options(search: Mapping[str, Any]) -> Iterator[Row]:
    """Every option of every slot, and whether the child uses it."""
    trained = {(block["layer"], block["part"], block["size"]): block for block in search["blocks"]}
    for slot, chosen in zip(search["slots"], search["child"]["choice"], strict=True):
        for number, option in enumerate(slot["options"]):
            block = trained.get((slot["layer"], slot["part"], option["size"]), {})
            more = {key: value for key, value in block.items() if key not in ("layer", "part", "size")}
            place = {"layer": slot["layer"], "part": slot["part"], "option": option["name"], "chosen": number == chosen}
            yield {**place, "score": option["score"], **option["costs"], **_flat(more)}


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
            "options": _join(choice["choice"]),
        }
    yield {"choice": "limit", **search["limits"]}


def _fronts(search: Mapping[str, Any]) -> Iterator[Row]:
    """Best score at each limit of each resource."""
    latency = [{**point, "limit": point["limit_ms"]} for point in search["pareto"]]
    for resource, points in {"latency_ms": latency, **search.get("fronts", {})}.items():
        for point in points:
            place = {"resource": resource, "limit": point["limit"], "score": point["score"]}
            yield {**place, **point["costs"], "options": _join(point["choice"])}


def _dependencies(search: Mapping[str, Any]) -> Iterator[Row]:
    """Dependency of the second on the first, for each two FFNs of a run."""
    for run in (search.get("fusion") or {}).get("runs", ()):
        for row, first in enumerate(run["layers"]):
            for column in range(row + 1, len(run["layers"])):
                pair = {"removed": first, "ffn": run["layers"][column]}
                fused = any({first, pair["ffn"]} <= set(group) for group in run["groups"])
                yield {**pair, "cosine_distance": run["dependency"][row][column], "fused": fused}


def _records(records: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """One row for each record."""
    yield from map(_flat, records)


def _flat(record: Mapping[str, Any]) -> Row:
    """Flatten a record: nested records become dotted columns, lists become text."""
    row: Row = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            row |= {f"{key}.{inner}": found for inner, found in _flat(value).items()}
        else:
            row[key] = _join(value) if isinstance(value, list | tuple) else value
    return row


def _join(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))


def _json(path: Path, document: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def _csv(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows with a column for each key, in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
