"""Problems with answers that can be verified."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from components.core.text.jsonl import read_user_rows
from components.core.text.judges.reasoning_tasks import Verifier
from components.core.text.row_files import Row
from components.core.text.toggle_template import ChatTemplate
from components.core.text.tokenizer import plain_prompt_ids
from components.core.text.verifier import boxed, verify

STATED = re.compile(r"\banswer(?: is|:|=)\s*:?\s*\**\s*([^\n]+)", re.IGNORECASE)
"""An answer that a completion names as its answer."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


@dataclass(frozen=True)
class Problem:
    """A problem of one split."""

    split: str
    number: int
    """Index in its split; sampling takes its seed from it, so that every model gets the same seed."""
    id: str
    question: str
    """Text of the user message in a chat."""
    prompt: str
    """Text that a base model completes."""
    answer: str
    verifier: Verifier | None = None
    """Scores answers; None: an answer is right where it equals `answer`."""

    def score(self, answer: str) -> float:
        """Score of an answer, 0 to 1; 1 is right."""
        return score_answer(answer, self.answer, self.verifier)

    def score_completion(self, text: str) -> float:
        """Score of the answer in a completion by a base model.

        A verifier also gets the whole text, since an answer may have several lines; the higher score counts.
        """
        named = self.score(completed_answer(text))
        return named if self.verifier is None else max(named, self.verifier.score(text.strip()))

    def is_completed_by(self, text: str) -> bool:
        """Whether the completion by a base model has the right answer."""
        return self.score_completion(text) == 1


def score_answer(answer: str, expected: str, verifier: Verifier | None) -> float:
    r"""Score of an answer, 0 to 1: the verifier's, of the content of a `\boxed{…}` where there is one; else 1 or 0.

    Raises:
        JudgeFailed: the answer cannot be judged, which says nothing about it.
    """
    return float(verify(answer, expected)) if verifier is None else verifier.score(boxed(answer).strip())


def problem_prompt_ids(folder: Path, problems: Sequence[Problem]) -> list[list[int]]:
    """Token ids of the prompt of each problem: a chat where the model has a chat template, else its plain prompt."""
    template = ChatTemplate.of(folder)
    if template is None:
        return plain_prompt_ids(folder, [problem.prompt for problem in problems])
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]
    texts = template.render(chats, add_generation_prompt=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [list(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def completed_answer(text: str) -> str:
    r"""The answer in a completion: what it names as its answer, a box, what follows `####`, else its last words.

    The last words are what follows the last colon. A sentence there is reduced to its last number.
    """
    if stated := STATED.findall(text):
        return _number_of_sentence(stated[0].strip())
    if "\\boxed" in text:
        return boxed(text)
    if "####" in text:
        return text.partition("####")[2].strip().partition("\n")[0].strip()
    return _number_of_sentence(text.rsplit(":", 1)[-1].strip())


def _number_of_sentence(text: str) -> str:
    """The last number of a text with words and numbers; other texts are returned without a closing full stop."""
    numbers = NUMBER.findall(text)
    if numbers and "\\" not in text and re.search(r"[^\W\d_]{2,}", text):
        return str(numbers[-1]).rstrip(",")
    return text.removesuffix(".").strip()


def read_problems(path: Path, split: str, limit: int) -> list[Problem]:
    """The first `limit` problems of a JSONL file; none where there is no such file.

    Raises:
        DataError: a row lacks a field, or has a verifier that is none.
    """
    rows = read_user_rows([path], _whole, skip_bad=False)[0] if path.is_file() else []
    return [Problem(split, number, *_fields(row)) for number, row in enumerate(with_distinct_ids(rows[:limit]))]


def with_distinct_ids(rows: Sequence[Row]) -> list[Row]:
    """The rows, with a number behind each id that an earlier row has: different problems are never taken for one."""
    taken = {str(row["id"]) for row in rows}
    first: set[str] = set()
    distinct = []
    for row in rows:
        identity, copies = str(row["id"]), 1
        if identity in first:
            while (identity := f"{row['id']}#{(copies := copies + 1)}") in taken:
                pass
            taken.add(identity)
        first.add(identity)
        distinct.append({**row, "id": identity})
    return distinct


def _whole(row: Row) -> Row:
    """The row, which has all fields."""
    _fields(row)
    return row


def _fields(row: Row) -> tuple[str, str, str, str, Verifier | None]:
    texts = str(row["id"]), str(row["question"]), str(row["prompt"]), str(row["answer"])
    return *texts, Verifier.of_row(row)
