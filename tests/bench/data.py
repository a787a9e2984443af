"""A large corpus through the data stage, and its rows as training reads them: `python -m tests.bench.data OUT`.

The corpus is made on the fly, of paragraphs from the documentation strings of Python's standard library. The data stage
and two readers run as processes of their own, whose memory is measured. On a part of the corpus, `datasets.map` encodes
the same rows with the same tokenizer, in turns with ours, and Megatron-Core reads our token file.
"""

import argparse
import ast
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from components.core.runtime.context import quiet_context
from components.core.text.corpus.encoding import encode_file
from components.core.text.corpus.token_file import TokenFile
from components.core.text.tokenizer import train_tokenizer
from tests.bench.environment import environment
from tests.bench.memory import run_measured
from tests.bench.rows import Row, in_turn, write_rows

THEIRS = ("datasets==5.2.0", "multiprocess==0.70.19", "megatron-core==0.16.1")
VOCABULARY, SEQ_LEN, PROCESSES = 32_768, 2048, 2
BYTES_A_TOKEN = 4.2
"""About as many bytes of JSON Lines as a token takes here; a corpus is made by its bytes."""
ROWS_READ = 4000
"""Packed rows that each reader reads."""


def paragraphs() -> list[str]:
    """Documentation strings of the standard library, cut at empty lines."""
    found = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                found += [part for part in text.split("\n\n") if len(part) > 80]
    return sorted(set(found))


def documents(num_bytes: int) -> Iterator[str]:
    """Lines of a corpus."""
    rng, parts, written = random.Random(0), paragraphs(), 0
    encoded = [json.dumps(part)[1:-1] for part in parts]
    while written < num_bytes:
        line = '{"text": "' + "\\n\\n".join(rng.choices(encoded, k=rng.randint(2, 24))) + '"}\n'
        written += len(line)
        yield line


def make(folder: Path, num_tokens: int) -> None:
    """Write the corpus, and a tokenizer that was trained on its paragraphs."""
    (folder / "own").mkdir(parents=True)
    with (folder / "own" / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(documents(int(num_tokens * BYTES_A_TOKEN)))
    train_tokenizer(paragraphs(), VOCABULARY, folder / "tokenizer")


def run_stage(folder: Path) -> None:
    """Run the data stage on the corpus."""
    from components.data.config import STAGE, DataConfig
    from components.data.stage import run

    for name in STAGE.outputs:
        (folder / "out" / name).mkdir(parents=True)
    context = quiet_context(folder / "work")
    context.placement = context.placement.model_copy(update={"threads": PROCESSES})
    started = time.monotonic()
    result: Any = run(
        DataConfig(), context=context, out=folder / "out", parent=folder / "tokenizer", own_corpus=folder / "own"
    )
    result["seconds"] = time.monotonic() - started
    (folder / "stage.json").write_text(json.dumps(result))


def read(folder: Path) -> None:
    """Read rows from the middle of an epoch on, as two ranks do; write how long the first took, and the rest."""
    from components.core.text.packing import corpus_stream

    corpus = folder / "out" / "corpus"
    children = []
    started = time.monotonic()
    for rank in range(PROCESSES):
        child = os.fork()
        if child == 0:
            stream = corpus_stream(
                corpus, folder / "tokenizer", "train", seq_len=SEQ_LEN, seed=0, folder=folder / "rows"
            )
            first = stream.num_rows // 2
            stream.rows([first + rank])
            opened = time.monotonic() - started
            targets = 0
            for at in range(0, ROWS_READ, 4):
                own = range(first + at * PROCESSES + rank, first + (at + 4) * PROCESSES, PROCESSES)
                targets += stream.rows(own).num_targets
            seconds = time.monotonic() - started - opened
            figures = {"opened": opened, "rows_per_s": ROWS_READ / seconds, "fill": targets / ROWS_READ / SEQ_LEN}
            (folder / f"read-{rank}.json").write_text(json.dumps(figures | {"rows": stream.num_rows}))
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit("a reader failed")


def _encode(batch: dict[str, list[str]], tokenizer: Any) -> dict[str, list[list[int]]]:
    return {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}


def compare_with_datasets(folder: Path) -> list[Row]:
    """Rows a second of `datasets.map` and of ours, on the rows of one file."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    rows = folder / "own" / "corpus.jsonl"
    datasets.disable_progress_bars()
    table = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder / "cache"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"))
    encode = functools.partial(_encode, tokenizer=tokenizer)

    def theirs() -> float:
        started = time.monotonic()
        made = table.map(encode, batched=True, num_proc=PROCESSES, remove_columns=["text"], load_from_cache_file=False)
        seconds = time.monotonic() - started
        assert len(made) == len(table)
        return len(table) / seconds

    def ours() -> float:
        started = time.monotonic()
        encode_file(rows, folder / "ours", folder / "tokenizer", PROCESSES)
        return len(table) / (time.monotonic() - started)

    found = in_turn({"ours": ours, "theirs": theirs}, 5)
    same = TokenFile(folder / "ours")
    for number in range(0, len(table), 997):
        expected = tokenizer(table[number]["text"], add_special_tokens=False)["input_ids"]
        assert same[number].token_ids.tolist()[:-1] == expected  # type: ignore[union-attr]
    versus = f"datasets.map, {PROCESSES} processes, rows/s: {found['theirs']:.0f}"
    return [Row("rows encoded", found["ours"], "rows/s", versus, found["ours"] / found["theirs"])]


def compare_with_megatron(path: Path) -> list[Row]:
    """Documents that Megatron-Core's reader reads as ours does."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs, ours = IndexedDataset(str(path)), TokenFile(path)
    assert len(theirs.document_indices) - 1 == len(ours)
    numbers = np.random.default_rng(0).integers(len(ours), size=10_000).tolist()
    for number in numbers:
        first, last = theirs.document_indices[number], theirs.document_indices[number + 1]
        parts = [theirs[sequence] for sequence in range(first, last)]
        assert np.array_equal(np.concatenate(parts), ours[number].token_ids)
    return [Row("documents read alike", len(numbers), "", "megatron-core's IndexedDataset", 1.0)]


def large(folder: Path, num_tokens: int) -> list[Row]:
    """The data stage and two readers on a large corpus."""
    make(folder, num_tokens)
    rows = []
    for step in ("stage", "read"):
        status, peak = run_measured([sys.executable, "-m", "tests.bench.data", f"--{step}", str(folder)])
        if status:
            raise SystemExit(f"{step} failed")
        rows.append(Row(f"{step}: peak memory of all processes", peak / 2**30, "GiB", "at most 1", 2**30 / peak))
    stage = json.loads((folder / "stage.json").read_text())
    tokens = sum(stage["tokens"].values())
    readers = [json.loads((folder / f"read-{rank}.json").read_text()) for rank in range(PROCESSES)]
    return [
        Row("tokens", tokens, ""),
        Row("documents", sum(stage["rows"].values()), ""),
        Row("data stage", stage["seconds"], "s"),
        Row("data stage, all of it", tokens / stage["seconds"], "tokens/s"),
        *rows,
        Row("a reader: opened and packed", max(reader["opened"] for reader in readers), "s"),
        Row("a reader: rows of an epoch", readers[0]["rows"], ""),
        Row(f"a reader: rows of {SEQ_LEN}", min(reader["rows_per_s"] for reader in readers), "rows/s"),
        Row("a reader: positions with a target", min(reader["fill"] for reader in readers), "", "all positions"),
        *compare_with_megatron(folder / "out" / "corpus" / "train"),
    ]


def main() -> None:
    """Measure, and write the rows; the program starts itself again with the packages of the other side in its path."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--stage", type=Path)
    parser.add_argument("--read", type=Path)
    arguments = parser.parse_args()
    if arguments.stage or arguments.read:
        run_stage(arguments.stage) if arguments.stage else read(arguments.read)
        return
    if os.environ.get("TESSERA_BENCH") != "data":
        packages = next((environment("data", *THEIRS).parents[1] / "lib").glob("python*/site-packages"))
        path = os.pathsep.join([os.environ.get("PYTHONPATH", "."), str(packages)])
        command = [sys.executable, "-m", "tests.bench.data", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "TESSERA_BENCH": "data"}).returncode)
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder:
        small = Path(folder) / "small"
        make(small, min(20_000_000, int(arguments.tokens)))
        rows = compare_with_datasets(small)
        rows += large(Path(folder) / "large", int(arguments.tokens))
    write_rows(rows, arguments.out)


if __name__ == "__main__":
    main()
