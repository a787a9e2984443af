"""Corpus, chats and problems, made or read, and the tokenizer that reads them."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import JsonValue
from tokenizers import Tokenizer

from components.core.chat import END_THINK, THINK, system_message
from components.core.job import Job
from components.core.rows import Row, write_rows
from components.core.tokenizer import add_toggle, train_tokenizer
from components.data import arithmetic, own_files
from components.data.config import ArithmeticConfig, DataConfig
from components.data.nemo_packed import write_packed

TOKENIZER_SAMPLE = 20000
"""Rows that a tokenizer is trained on, at most."""


def run(
    config: DataConfig,
    *,
    job: Job,
    out: Path,
    parent: Path | None = None,
    own_corpus: Path | None = None,
    own_chats: Path | None = None,
    own_problems: Path | None = None,
) -> dict[str, JsonValue]:
    """Write the four outputs; splits share no row. Source: arXiv 2505.00949, section 3."""
    if own_corpus is None and own_chats is None and own_problems is None:
        tables = demo_tables(config.arithmetic, config.seed or 0)
        skipped = 0
    else:
        tables, skipped = own_tables(config, own_corpus, own_chats, own_problems)
    counts: dict[str, JsonValue] = {}
    for (output, split), rows in tables.items():
        counts[f"{output}/{split}"] = write_rows(out / output / f"{split}.jsonl", rows)
    if parent is not None:
        vocabulary = add_toggle(parent, out / "tokenizer")
    else:
        train_tokenizer(_texts(tables), config.vocab_size, out / "tokenizer")
        vocabulary = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json")).get_vocab_size()
    if config.nemo_packed:
        write_packed(tables["chats", "train"], out / "tokenizer", out / "chats", config.nemo_packed, config.seed or 0)
    if skipped:
        job.note(f"{skipped} malformed lines were left out")
    return {"rows": counts, "skipped": skipped, "vocab_size": vocabulary}


Tables = dict[tuple[str, str], Sequence[Row]]
"""Rows by (output, split)."""


def demo_tables(config: ArithmeticConfig, seed: int) -> Tables:
    """The world of arithmetic."""
    rng = random.Random(seed)
    hard = (config.hard_levels, config.hard_share)
    train = arithmetic.sample("train", config.num_train, config.standard_levels, rng, hard)
    validation = arithmetic.sample("validation", config.num_validation, config.standard_levels, rng, hard)
    standard = arithmetic.sample("test", config.num_test, config.standard_levels, rng)
    longest = arithmetic.sample("test", config.num_test, config.hard_levels, rng)
    told = train[: config.num_chats]
    return {
        ("corpus", "train"): [_document(problem) for problem in train],
        ("corpus", "validation"): [_document(problem) for problem in validation],
        ("chats", "train"): [_chat(problem, mode) for problem in told for mode in ("on", "off")],
        ("chats", "validation"): [_chat(problem, mode) for problem in validation for mode in ("on", "off")],
        ("problems", "train"): [_problem(problem) for problem in train],
        ("problems", "validation"): [_problem(problem) for problem in validation],
        ("problems", "test-standard"): [_problem(problem) for problem in standard],
        ("problems", "test-hard"): [_problem(problem) for problem in longest],
    }


def own_tables(
    config: DataConfig, corpus: Path | None, chats: Path | None, problems: Path | None
) -> tuple[Tables, int]:
    """The user's rows, split by hash; what the user does not give stays empty. Also how many lines were left out."""
    tables: Tables = {}
    skipped = 0
    readers: tuple[tuple[str, Path | None, Callable[..., tuple[list[Row], int]], str], ...] = (
        ("corpus", corpus, own_files.corpus_rows, "text"),
        ("chats", chats, own_files.chat_rows, "messages"),
        ("problems", problems, own_files.problem_rows, "question"),
    )
    for output, folder, read, key in readers:
        rows, bad = read(folder, skip_bad=config.skip_bad) if folder is not None else ([], 0)
        skipped += bad
        out = [own_files.held_out(f"validation {row.get(key, row)}", config.validation_share) for row in rows]
        if rows and not any(out):
            out[0] = len(rows) > 1
        tables[output, "validation"] = [row for row, away in zip(rows, out, strict=True) if away]
        tables[output, "train"] = [row for row, away in zip(rows, out, strict=True) if not away]
    train = tables["problems", "train"]
    tested = [own_files.held_out(f"test {row['question']}", config.test_share) for row in train]
    if train and not any(tested):
        tested[0] = len(train) > 1
    tables["problems", "test-standard"] = [row for row, away in zip(train, tested, strict=True) if away]
    tables["problems", "test-hard"] = []
    tables["problems", "train"] = [row for row, away in zip(train, tested, strict=True) if not away]
    return tables, skipped


def _document(problem: arithmetic.Problem) -> Row:
    return {"prompt": problem.question, "completion": f"{problem.trace}:{problem.answer}"}


def _chat(problem: arithmetic.Problem, mode: str) -> Row:
    answer = f"{THINK}{problem.trace}{END_THINK}{problem.answer}" if mode == "on" else problem.answer
    user = {"role": "user", "content": problem.question}
    return {
        "messages": [system_message(mode), user, {"role": "assistant", "content": answer}],
        "reasoning": mode,
    }


def _problem(problem: arithmetic.Problem) -> Row:
    return {
        "id": problem.question,
        "question": problem.question,
        "prompt": problem.question,
        "answer": problem.answer,
        "level": problem.level,
    }


def _texts(tables: Tables) -> list[str]:
    """What a tokenizer is trained on: corpus, chats and the system messages."""
    texts = [system_message(mode)["content"] for mode in ("on", "off") for _ in range(1000)]
    for row in tables["corpus", "train"][:TOKENIZER_SAMPLE]:
        texts.append(str(row["text"]) if "text" in row else f"{row['prompt']}{row['completion']}")
    for row in tables["chats", "train"][:TOKENIZER_SAMPLE]:
        messages = row["messages"]
        assert isinstance(messages, list)
        texts += [message["content"].replace(THINK, " ").replace(END_THINK, " ") for message in messages]
    return texts
