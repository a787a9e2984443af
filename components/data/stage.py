"""The data stage: corpus, chats and problems, generated or from files of the user, and their tokenizer."""

import json
import random
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from pydantic import JsonValue
from tokenizers import Tokenizer

from components.core.runtime.context import StageContext
from components.core.text.corpus.encoding import encode_corpus
from components.core.text.embedding_rows import refuse_tokens_without_row, tokens_without_row
from components.core.text.jsonl import write_rows
from components.core.text.row_files import Row
from components.core.text.toggle import END_THINK, THINK, system_message
from components.core.text.tokenizer import add_toggle, train_tokenizer
from components.data import arithmetic, own_files
from components.data.config import ArithmeticConfig, DataConfig
from components.data.corpus import write_corpus
from components.data.nemo_packed import write_packed
from components.data.overlap import FRACTION, NUM_WORDS, find_overlap
from components.data.own_files import CorpusReader
from components.data.reasoning_problems import answer_chat, draw_problems, in_turn
from components.data.splits import question_digest, split_chats, split_problems

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
    notes: list[str] = []
    skipped = 0
    if own_corpus is None and own_chats is None and own_problems is None and not config.reasoning_gym:
        tables = demo_tables(config.arithmetic, config.seed or 0)
    else:
        tables, skipped = own_tables(
            config,
            own_chats,
            own_problems,
            notes,
            lambda done, total: context.progress(done, total, "problems of reasoning-gym"),
        )
    counts: dict[str, JsonValue] = {}
    for (output, split), rows in tables.items():
        counts[f"{output}/{split}"] = write_rows(out / output / f"{split}.jsonl", rows)
    if own_corpus is not None:
        reader = CorpusReader(own_corpus, config.skip_bad, notes)
        held_out = _held_out_digests(tables)
        written = write_corpus(
            reader, out / "corpus", config.corpus_weights, config.validation_fraction, held_out, context
        )
        counts |= {f"corpus/{split}": count for split, count in written.items()}
        skipped += reader.skipped
        notes += _overlap_notes(tables, out / "corpus" / "train.jsonl", context)
    for note in notes:
        context.note(note)
    vocabulary = _write_tokenizer(config, tables, out, parent, context)
    tokens = encode_corpus(
        out / "corpus",
        parent or out / "tokenizer",
        context.placement.threads,
        lambda done, total: context.progress(done >> 20, total >> 20, "MiB of the corpus encoded"),
    )
    if config.nemo_packed:
        _write_nemo_packed(config, tables, out, context)
    return {"rows": counts, "skipped": skipped, "vocab_size": vocabulary, "tokens": dict(tokens)}


def _write_tokenizer(
    config: DataConfig, tables: "Tables", out: Path, parent: Path | None, context: StageContext
) -> int:
    """Write the parent's tokenizer with the toggle, or a new one; returns the size of its vocabulary."""
    if parent is None:
        train_tokenizer(_texts(tables, out / "corpus" / "train.jsonl"), config.vocab_size, out / "tokenizer")
        return int(Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json")).get_vocab_size())
    _refuse_unreadable_problems(tables, parent)
    toggled = add_toggle(parent, out / "tokenizer")
    if toggled.replaced:
        context.note(
            "Tessera's chat template stands in place of the parent's, which cannot carry the switch: "
            f"{toggled.replaced}"
        )
    return toggled.vocab_size


def _write_nemo_packed(config: DataConfig, tables: "Tables", out: Path, context: StageContext) -> None:
    """Write the chats in NeMo's form too; a note says where some are too long."""
    chats = tables["chats", "train"]
    packed = write_packed(chats, out / "tokenizer", out / "chats", config.nemo_packed, config.seed or 0)
    if packed < len(chats):
        context.note(
            f"{len(chats) - packed} chats are longer than nemo_packed={config.nemo_packed} and were left out of NeMo's "
            "packs"
        )


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
    config: DataConfig,
    chats: Path | None,
    problems: Path | None,
    notes: list[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tables, int]:
    """The user's chats and problems, split by question, and problems of reasoning-gym; other tables are empty.

    No chat for training has the question of a validation or test problem. `notes` takes one sentence for each reason
    why something was left out, `progress` how many problems of reasoning-gym are drawn, and how many there will be.

    Returns:
        The tables, an empty one for each split of the corpus, and how many malformed lines were skipped.
    """
    found: dict[str, list[Row]] = {"problems": [], "chats": []}
    skipped = 0
    for output, folder, read in (
        ("problems", problems, own_files.problem_rows),
        ("chats", chats, own_files.chat_rows),
    ):
        if folder is not None:
            found[output], bad = read(folder, skip_bad=config.skip_bad, notes=notes)
            skipped += bad
    splits = split_problems(found["problems"], config.validation_fraction, config.test_fraction)
    drawn: list[dict[str, list[Row]]] = []
    if config.reasoning_gym:
        taken = {question_digest(str(row["question"])) for row in found["problems"]}
        drawn = draw_problems(config, taken, notes, progress)
    tables: Tables = {
        ("problems", split): in_turn([rows, *(task.get(split, []) for task in drawn)]) for split, rows in splits.items()
    }
    for split, rows in split_chats(
        found["chats"], own_files.questions, config.validation_fraction, _held_out_digests(tables)
    ).items():
        answered = [answer_chat(problem) for problem in in_turn([task[split] for task in drawn])]
        tables["chats", split], tables["corpus", split] = rows + answered, []
    return tables, skipped


def _held_out_problems(tables: Tables) -> list[Row]:
    """Problems of validation and test."""
    return [
        row for (output, split), rows in tables.items() if output == "problems" and split != "train" for row in rows
    ]


def _held_out_digests(tables: Tables) -> set[bytes]:
    """Hashes of the questions of validation and test."""
    return {question_digest(str(row["question"])) for row in _held_out_problems(tables)}


def _overlap_notes(tables: Tables, corpus: Path, context: StageContext) -> list[str]:
    """A sentence about the held-out problems whose question stands in the text that is trained on."""
    problems = _held_out_problems(tables)
    overlap = find_overlap([str(row["question"]) for row in problems], corpus, context.placement.threads)
    if not overlap.num_compared:
        return []
    note = (
        f"{len(overlap.problems)} of {overlap.num_compared} held-out problems stand in the corpus: "
        f"{FRACTION:.0%} or more of the sequences of {NUM_WORDS} words of their question"
    )
    if overlap.problems:
        first = problems[overlap.problems[0]]
        note += f", such as {str(first['question'])[:80]!r} in row {overlap.documents[0] + 1} of corpus/train.jsonl"
    return [note]


def _refuse_unreadable_problems(tables: Tables, parent: Path) -> None:
    """Refuse problems that the parent cannot read; chats are for a model with more rows.

    Raises:
        DataError: a text has a token that the parent's embedding has no row for.
    """
    if not tokens_without_row(parent):
        return
    tokenizer = Tokenizer.from_file(str(parent / "tokenizer.json"))
    for (output, split), rows in tables.items():
        if output == "problems":
            encoded = tokenizer.encode_batch([str(row["prompt"]) for row in rows], add_special_tokens=False)
            refuse_tokens_without_row((text.ids for text in encoded), parent, f"{output}/{split}")


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


def _texts(tables: Tables, corpus: Path) -> list[str]:
    """Texts that a tokenizer is trained on: corpus, chats and system messages."""
    texts = [system_message(mode)["content"] for mode in ("on", "off") for _ in range(1000)]
    with corpus.open(encoding="utf-8") as lines:
        for row in map(json.loads, islice(lines, TOKENIZER_SAMPLE)):
            texts.append(str(row["text"]) if "text" in row else f"{row['prompt']}{row['completion']}")
    for row in tables["chats", "train"][:TOKENIZER_SAMPLE]:
        messages = row["messages"]
        assert isinstance(messages, list)
        texts += [message["content"].replace(THINK, " ").replace(END_THINK, " ") for message in messages]
    return texts
