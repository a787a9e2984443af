"""Problems of reasoning-gym with their steps, as chats in both modes and as problems; see `real_model.py`.

It runs in an environment that has reasoning-gym and not Tessera: `python reasoning_problems.py FOLDER`.
"""

import json
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS

COUNT, NUM_CHATS = 1200, 1500


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


def rows() -> Iterator[tuple[str, str, str]]:
    """Question, steps and answer of each problem."""
    for item in reasoning_gym.create_dataset("chain_sum", size=COUNT, seed=7, max_terms=4, max_digits=2):
        steps = "\n".join(steps_of_sum(item["metadata"]["expression"]))
        yield item["question"], steps, item["answer"].strip()
    for item in reasoning_gym.create_dataset("leg_counting", size=COUNT, seed=7, max_animals=4, max_instances=9):
        yield item["question"].strip(), "\n".join(steps_of_legs(item["metadata"]["animals"])), item["answer"]


def chat(mode: str, question: str, reply: str) -> str:
    """A chat with the switch, as a line of JSON."""
    turns = {"system": f"detailed thinking {mode}", "user": question, "assistant": reply}
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns.items()]}) + "\n"


def main() -> None:
    """Write `chats.jsonl` and `problems.jsonl`; no question is in both."""
    folder, found = Path(sys.argv[1]), list({row[0]: row for row in rows()}.values())
    random.Random(1).shuffle(found)
    for _, steps, answer in found:
        assert steps.rpartition(" = ")[2].partition(" ")[0] == answer, (steps, answer)
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as chats:
        for question, steps, answer in found[:NUM_CHATS]:
            chats.write(chat("on", question, f"<think>\n{steps}\n</think>\n\n{answer}"))
            chats.write(chat("off", question, answer))
    with (folder / "problems.jsonl").open("w", encoding="utf-8") as problems:
        for number, (question, _, answer) in enumerate(found[NUM_CHATS:]):
            problems.write(json.dumps({"id": number, "question": question, "answer": answer}) + "\n")


if __name__ == "__main__":
    main()
