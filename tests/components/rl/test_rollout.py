import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import Tokenizer

from components.core.base.errors import StageFailed
from components.core.serving.engine import Engine, Sample
from components.core.text.judges.reasoning_tasks import Verifier, make_problem
from components.core.text.judges.worker_pool import JudgeFailed
from components.rl.config import RlConfig
from components.rl.rollout import (
    ACCURACY_REWARD,
    FORMAT_REWARD,
    Answer,
    Environment,
    Problem,
    Reward,
    Sampler,
    answer_text,
    check_weight_version,
    overlong_penalty,
)
from tests.components.core import tiny_models
from tests.components.core.tiny_models import EOS, TOKENS
from tests.waiting import PATIENCE_S

PROBLEMS = [Problem("a", [7], "4", "on"), Problem("b", [8], "5", "on")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny_models.tokenizer().save_pretrained(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def ids(*tokens: str) -> tuple[int, ...]:
    return tuple(TOKENS.index(token) for token in tokens)


def engine(*samples: tuple[int, ...], asked: dict[str, Any] | None = None) -> Engine:
    """Gives these samples to every prompt, made by weights 3."""

    def generate(prompts: list[list[int]], **options: Any) -> Iterator[tuple[int, list[Sample]]]:
        (asked if asked is not None else {}).update(options)
        for number in reversed(range(len(prompts))):
            yield number, [Sample(sample, (-0.5,) * len(sample), "stop", 3) for sample in samples]

    return cast("Engine", SimpleNamespace(generate=generate))


def rolled_out(
    engine: Engine, tokenizer: Tokenizer, environment: Environment, seed: int = 1, **settings: Any
) -> list[list[Answer]]:
    config = RlConfig(**{"max_tokens": 8, **settings})
    return Sampler(engine, tokenizer, EOS, config, environment).sample(PROBLEMS, seed=seed, samples=2)


def test_every_problem_gets_its_group_of_judged_answers(tokenizer):
    right, wrong = ids("<think>", "1", "</think>", "4", "<eos>"), ids("4", "4")
    groups = rolled_out(engine(right, wrong), tokenizer, Environment())

    assert [[answer.problem.id for answer in group] for group in groups] == [["a", "a"], ["b", "b"]]
    assert [answer.reward for answer in groups[0]] == [Reward(1.2, True, True), Reward(0.0, False, False)]
    assert groups[1][0].reward == Reward(0.2, False, True)
    assert [answer.truncated for answer in groups[0]] == [False, False]
    assert (groups[0][1].token_ids, groups[0][1].logprobs, groups[0][1].version) == (wrong, (-0.5, -0.5), 3)


def test_requests_have_seeds_of_their_own(tokenizer):
    seeds = []
    for seed in (1, 1, 2):
        asked: dict[str, Any] = {}
        rolled_out(engine(ids("4"), ids("4"), asked=asked), tokenizer, Environment(), seed)
        seeds.append(asked["seeds"])

    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 4


def test_a_problem_in_quarantine_is_left_out_as_a_whole(tokenizer):
    def judge(answer: str, expected: str, verifier: Verifier | None) -> float:
        if expected == "4":
            raise ZeroDivisionError("judge")
        return True

    environment = Environment(judge)
    groups = rolled_out(engine(ids("4"), ids("4")), tokenizer, environment)

    assert [[answer.problem.id for answer in group] for group in groups] == [["b", "b"]]
    assert environment.quarantine == {"a": "ZeroDivisionError: judge"}


def test_answers_are_judged_while_others_are_generated(tokenizer):
    judged, waited = threading.Event(), []

    def judge(answer: str, expected: str, verifier: Verifier | None) -> float:
        judged.set()
        return answer == expected

    def generate(prompts: list[list[int]], **options: Any) -> Iterator[tuple[int, list[Sample]]]:
        for number in range(len(prompts)):
            yield number, [Sample(ids("4"), (-0.5,), "stop", 3)] * 2
            waited.append(judged.wait(PATIENCE_S))

    slow = cast("Engine", SimpleNamespace(generate=generate))
    assert len(rolled_out(slow, tokenizer, Environment(judge))) == 2
    assert waited == [True, True]


@pytest.mark.parametrize(("length", "expected"), [(1, 0.0), (80, 0.0), (85, 0.25), (90, 0.5), (100, 1.0)])
def test_the_penalty_for_length_grows_linearly_to_one(length, expected):
    assert overlong_penalty(length, max_tokens=100, buffer=20) == expected
    assert overlong_penalty(length, max_tokens=100, buffer=0) == 0.0


def test_long_answers_earn_less(tokenizer):
    right = ids("<think>", "1", "</think>", "4", "<eos>")
    groups = rolled_out(engine(right, right[2:]), tokenizer, Environment(), max_tokens=6, overlong_buffer=4)

    assert [answer.reward.total for answer in groups[0]] == pytest.approx([1.2 - 0.75, -0.25])
    assert [answer.reward.correct for answer in groups[0]] == [True, False]


def test_the_text_has_its_tags_and_not_its_end(tokenizer):
    assert answer_text(tokenizer, ids("<think>", "1", "</think>", "4", "<eos>"), EOS) == "<think>1</think>4"
    assert answer_text(tokenizer, ids("<think>", "1"), EOS) == "<think>1"
    assert answer_text(tokenizer, ids("<eos>"), EOS) == ""


def test_answers_of_other_weights_are_refused(tokenizer):
    groups = rolled_out(engine(ids("4"), ids("4")), tokenizer, Environment())

    check_weight_version(groups, version=3)
    check_weight_version([], version=5)
    with pytest.raises(StageFailed, match="learner has weights 4, but weights 3 sampled an answer"):
        check_weight_version(groups, version=4)


@pytest.mark.parametrize(
    ("text", "mode", "expected"),
    [
        ("<think>2+2=4</think>4", "on", Reward(1.2, True, True)),
        ("<think>2+2=5</think>5", "on", Reward(0.2, False, True)),
        ("4", "on", Reward(0.0, True, False)),  # right, but without its thinking: no reward for a lucky guess
        ("<think></think>4", "on", Reward(0.0, True, False)),
        ("<think>2+2=4", "on", Reward(0.0, False, False)),
        ("4", "off", Reward(1.2, True, True)),
        ("<think>2+2=4</think>4", "off", Reward(0.0, True, False)),
    ],
)
def test_an_answer_earns_accuracy_and_format(text, mode, expected):
    environment = Environment()

    assert environment.score("p", text, "4", mode) == expected
    assert environment.quarantine == {}


def test_a_verifiers_score_is_the_reward_for_accuracy():
    gym = pytest.importorskip("reasoning_gym")
    row = make_problem("spell_backward", {}, seed=1, size=1, index=0)
    answer, verifier = str(row["answer"]), Verifier.of_row(row)
    dataset = gym.create_dataset("spell_backward", seed=1, size=1)
    environment = Environment()

    for given in (answer, answer[:-1], "!"):
        score = dataset.score_answer(given, dataset[0])
        reward = environment.score("p", f"<think>so</think>{given}", answer, "on", verifier)
        assert reward == Reward(ACCURACY_REWARD * score + FORMAT_REWARD, given == answer, True)
        assert environment.score("p", given, answer, "on", verifier) == Reward(0.0, given == answer, False)
    assert environment.quarantine == {}


def test_a_problem_whose_judge_fails_is_put_in_quarantine_and_scores_nothing():
    def judge(answer: str, expected: str, verifier: Verifier | None) -> float:
        if expected == "?":
            raise ValueError("what is asked?")
        return answer == expected

    environment = Environment(judge)

    assert environment.score("bad", "<think>x</think>4", "?", "on") is None
    assert environment.score("good", "<think>x</think>4", "4", "on") == Reward(1.2, True, True)
    assert environment.quarantine == {"bad": "ValueError: what is asked?"}


def test_a_problem_in_quarantine_is_not_judged_again():
    judged = []

    def judge(answer: str, expected: str, verifier: Verifier | None) -> float:
        judged.append(answer)
        raise JudgeFailed("comparing takes more than 5 s of processor time")

    environment = Environment(judge)

    assert [environment.score("bad", f"<think>x</think>{n}", "x", "on") for n in range(3)] == [None] * 3
    assert judged == ["0"]
