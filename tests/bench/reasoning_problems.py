"""Problems of two tasks of reasoning-gym, as chats in both modes with their steps, and as problems.

A program of its own, because the package is slow to load: `python reasoning_problems.py FOLDER [--small]`.
"""

import json
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS


class Amount(NamedTuple):
    """How many problems of each task are made, how many of all become chats, and the settings of the tasks."""

    per_task: int
    chats: int
    sums: dict[str, Any]
    legs: dict[str, Any]


WHOLE = Amount(2000, 1500, {"max_terms": 3, "max_digits": 1}, {"min_animals": 2, "max_animals": 2, "max_instances": 5})
"""What a model of 135 M parameters learns in minutes: of twice as long problems it solved 2 % after fine-tuning."""
SMALL = Amount(800, 700, {"max_terms": 2, "max_digits": 1}, {"min_animals": 2, "max_animals": 2, "max_instances": 3})


def steps_of_sum(expression: str) -> Iterator[str]:
    """The steps of a chain of sums and differences."""
    tokens = expression.split()
    total = int(tokens[0])
    for sign, number in zip(tokens[1::2], tokens[2::2], strict=True):
        after = total + int(number) if sign == "+" else total - int(number)
        yield f"{total} {sign} {number} = {after}"
        total = after


def steps_of_legs(animals: Mapping[str, int]) -> Iterator[str]:
    """The legs of each kind of animal, then their sum, one after the other."""
    parts = {animal: count * ANIMALS[animal] for animal, count in animals.items()}
    for animal, count in animals.items():
        yield f"{count} x {ANIMALS[animal]} = {parts[animal]} for {animal}"
    total, *rest = parts.values()
    for part in rest:
        yield f"{total} + {part} = {total + part}"
        total += part


def rows(amount: Amount) -> Iterator[tuple[str, str, str]]:
    """Question, steps and answer of each problem."""
    for item in reasoning_gym.create_dataset("chain_sum", size=amount.per_task, seed=7, **amount.sums):
        steps = "\n".join(steps_of_sum(item["metadata"]["expression"]))
        yield item["question"], steps, item["answer"].strip()
    for item in reasoning_gym.create_dataset("leg_counting", size=amount.per_task, seed=7, **amount.legs):
        yield item["question"].strip(), "\n".join(steps_of_legs(item["metadata"]["animals"])), item["answer"]


def chat(mode: str, question: str, reply: str) -> str:
    """A chat with the switch, as a line of JSON."""
    turns = {"system": f"detailed thinking {mode}", "user": question, "assistant": reply}
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns.items()]}) + "\n"


def main() -> None:
    """Write `chats.jsonl` and `problems.jsonl`; no question is in both."""
    amount = SMALL if sys.argv[2:] == ["--small"] else WHOLE
    folder, found = Path(sys.argv[1]), list({row[0]: row for row in rows(amount)}.values())
    random.Random(1).shuffle(found)
    for _, steps, answer in found:
        assert steps.rpartition(" = ")[2].partition(" ")[0] == answer, (steps, answer)
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as chats:
        for question, steps, answer in found[: amount.chats]:
            chats.write(chat("on", question, f"<think>\n{steps}\n</think>\n\n{answer}"))
            chats.write(chat("off", question, answer))
    with (folder / "problems.jsonl").open("w", encoding="utf-8") as problems:
        for number, (question, _, answer) in enumerate(found[amount.chats :]):
            problems.write(json.dumps({"id": number, "question": question, "answer": answer}) + "\n")


if __name__ == "__main__":
    main()
