import pytest

from components.rl.reward import Environment, Reward


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


def test_a_problem_whose_judge_fails_is_put_in_quarantine_and_scores_nothing():
    def judge(answer: str, expected: str) -> bool:
        if expected == "?":
            raise ValueError("what is asked?")
        return answer == expected

    environment = Environment(judge)

    assert environment.score("bad", "<think>x</think>4", "?", "on") is None
    assert environment.score("good", "<think>x</think>4", "4", "on") == Reward(1.2, True, True)
    assert environment.quarantine == {"bad": "ValueError: what is asked?"}
