import pytest

from components.core.text.problems import Problem, completed_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7+5=2 2*3=6: 6", "6"),
        (" 6 \n", "6"),
        ("a: b: 7", "7"),
        ("", ""),
        (" The answer is 18.", "18"),
        (" She sells 9 eggs.\nThe final answer is: $18.\nThat is all she sells in 7 days.", "$18"),
        (" 16 - 3 - 4 = 9 eggs, and 9 * 2 = 18\n#### 18\n", "18"),
        (r" so we get \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r" \frac{1}{2}", r"\frac{1}{2}"),
        (" She makes 1,800 dollars every day.", "1,800"),
        (" The answer is Paris.", "Paris"),
        (" x=3", "x=3"),
        (" -4", "-4"),
    ],
)
def test_the_answer_in_a_completion_is_found(text, answer):
    assert completed_answer(text) == answer


def test_a_sentence_with_the_right_number_is_right():
    problem = Problem("standard", 0, "p", "q", "q\nAnswer:", "18")

    assert problem.is_completed_by(" The answer is 18.")
    assert problem.is_completed_by("18")
    assert not problem.is_completed_by(" The answer is 19.")
