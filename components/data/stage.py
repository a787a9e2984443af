"""The data stage: corpus, chats and problems, generated or from files of the user, and their tokenizer."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import JsonValue
from tokenizers import Tokenizer

from components.core.runtime.context import StageContext
from components.core.text.embedding_rows import refuse_tokens_without_row, tokens_without_row
from components.core.text.jsonl import write_rows
from components.core.text.row_files import Row
from components.core.text.toggle import END_THINK, THINK, system_message
from components.core.text.tokenizer import add_toggle, train_tokenizer
from components.data import arithmetic, own_files
from components.data.config import ArithmeticConfig, DataConfig
from components.data.nemo_packed import write_packed
from components.data.splits import question_digest, split_problems, split_rows

TOKENIZER_SAMPLE = 20000
"""Most rows that a tokenizer is trained on."""


def run(
    config: DataConfig,
    *,
    context: StageContext,
    out: Path,
    parent: Path | None = None,
    own_corpus: Path | None = None,
    own_chats: Path | None = None,
    own_problems: Path | None = None,
) -> dict[str, JsonValue]:
    """Write the four outputs; splits share no question. Source: arXiv 2505.00949, section 3."""
    if own_corpus is None and own_chats is None and own_problems is None:
        tables = demo_tables(config.arithmetic, config.seed or 0)
        skipped = 0
    else:
        notes: list[str] = []
        tables, skipped = own_tables(config, own_corpus, own_chats, own_problems, notes)
        for note in notes:
            context.note(note)
    counts: dict[str, JsonValue] = {}
    for (output, split), rows in tables.items():
        counts[f"{output}/{split}"] = write_rows(out / output / f"{split}.jsonl", rows)
    if parent is not None:
        _refuse_unreadable_texts(tables, parent)
        toggled = add_toggle(parent, out / "tokenizer")
        vocabulary = toggled.vocab_size
        if toggled.replaced:
            context.note(
                "Tessera's chat template stands in place of the parent's, which cannot carry the switch: "
                f"{toggled.replaced}"
            )
    else:
        train_tokenizer(_texts(tables), config.vocab_size, out / "tokenizer")
        vocabulary = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json")).get_vocab_size()
    if config.nemo_packed:
        packed = write_packed(
            tables["chats", "train"], out / "tokenizer", out / "chats", config.nemo_packed, config.seed or 0
        )
        if packed < len(tables["chats", "train"]):
            too_long = len(tables["chats", "train"]) - packed
            context.note(
                f"{too_long} chats are longer than nemo_packed={config.nemo_packed} and were left out of NeMo's packs"
            )
    return {"rows": counts, "skipped": skipped, "vocab_size": vocabulary}


Tables = dict[tuple[str, str], Sequence[Row]]
"""Rows by (output, split)."""


def demo_tables(config: ArithmeticConfig, seed: int) -> Tables:
    """Generated arithmetic problems, as documents, chats and problems."""
    rng = random.Random(seed)
    hard = (config.hard_levels, config.hard_fraction)
    train = arithmetic.sample("train", config.num_train, config.standard_levels, rng, hard)
    validation = arithmetic.sample("validation", config.num_validation, config.standard_levels, rng, hard)
    standard = arithmetic.sample("test", config.num_test, config.standard_levels, rng)
    hardest = arithmetic.sample("test", config.num_test, config.hard_levels, rng)
    chats = train[: config.num_chats]
    return {
        ("corpus", "train"): [_document(problem) for problem in train],
        ("corpus", "validation"): [_document(problem) for problem in validation],
        ("chats", "train"): [_chat(problem, mode) for problem in chats for mode in ("on", "off")],
        ("chats", "validation"): [_chat(problem, mode) for problem in validation for mode in ("on", "off")],
        ("problems", "train"): [_problem(problem) for problem in train],
        ("problems", "validation"): [_problem(problem) for problem in validation],
        ("problems", "test-standard"): [_problem(problem) for problem in standard],
        ("problems", "test-hard"): [_problem(problem) for problem in hardest],
    }


def own_tables(
    config: DataConfig, corpus: Path | None, chats: Path | None, problems: Path | None, notes: list[str] | None = None
) -> tuple[Tables, int]:
    """The user's rows, split by question; tables that the user gives no file for are empty.

    No chat or document for training has the question of a validation or test problem. `notes` takes one sentence for
    each reason why something was left out.

    Returns:
        The tables, and how many malformed lines and files were skipped.
    """
    readers: dict[str, tuple[Path | None, Callable[..., tuple[list[Row], int]]]] = {
        "problems": (problems, own_files.problem_rows),
        "chats": (chats, own_files.chat_rows),
        "corpus": (corpus, own_files.corpus_rows),
    }
    rows: dict[str, list[Row]] = {}
    skipped = 0
    for output, (folder, read) in readers.items():
        rows[output], bad = read(folder, skip_bad=config.skip_bad, notes=notes) if folder is not None else ([], 0)
        skipped += bad
    splits = {"problems": split_problems(rows["problems"], config.validation_fraction, config.test_fraction)}
    excluded = (row for split, out in splits["problems"].items() if split != "train" for row in out)
    held_out = {question_digest(str(row["question"])) for row in excluded}
    for output in ("chats", "corpus"):
        splits[output] = split_rows(rows[output], own_files.questions, config.validation_fraction, held_out)
    return {(output, split): out for output, tables in splits.items() for split, out in tables.items()}, skipped


def _refuse_unreadable_texts(tables: Tables, parent: Path) -> None:
    """Refuse texts that the parent reads as they are, and cannot: chats are for a model with more rows.

    Raises:
        DataError: a text has a token that the parent's embedding has no row for.
    """
    if not tokens_without_row(parent):
        return
    tokenizer = Tokenizer.from_file(str(parent / "tokenizer.json"))
    for (output, split), rows in tables.items():
        if output != "chats":
            texts = ["\n".join(str(row[key]) for key in ("text", "prompt", "completion") if key in row) for row in rows]
            encoded = (text.ids for text in tokenizer.encode_batch(texts, add_special_tokens=False))
            refuse_tokens_without_row(encoded, parent, f"{output}/{split}")


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
    """Texts that a tokenizer is trained on: corpus, chats and system messages."""
    texts = [system_message(mode)["content"] for mode in ("on", "off") for _ in range(1000)]
    for row in tables["corpus", "train"][:TOKENIZER_SAMPLE]:
        texts.append(str(row["text"]) if "text" in row else f"{row['prompt']}{row['completion']}")
    for row in tables["chats", "train"][:TOKENIZER_SAMPLE]:
        messages = row["messages"]
        assert isinstance(messages, list)
        texts += [message["content"].replace(THINK, " ").replace(END_THINK, " ") for message in messages]
    return texts
