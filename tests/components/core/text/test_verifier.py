from concurrent.futures import ThreadPoolExecutor

import pytest

from components.core.text.verifier import verify


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("4", "4"),
        (" 4.\n", "4"),
        ("yes,  of\ncourse", "yes, of course"),
        (r"It is \boxed{3}, no: \boxed{4}", "4"),
        ("0.5", "1/2"),
        (r"\frac{1}{2}", "0.5"),
        (r"so \boxed{\frac{1}{2}}", "1/2"),
        ("1,000", "1000"),
        ("x + 1", "1 + x"),
        (r"\sqrt{4}", "2"),
        ("(3,4)", "(3, 4)"),
    ],
)
def test_equal_answers_are_right(answer: str, expected: str) -> None:
    assert verify(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "4"),
        ("5", "4"),
        ("-4", "4"),
        ("44", "4"),
        ("no", "yes"),
        ("4 or 5", "4"),
        ("3, 4", "4"),
        (r"\boxed{5} although 4", "4"),
        ("}{$", "4"),
        ("1/0", "2"),
    ],
)
def test_other_answers_are_wrong(answer: str, expected: str) -> None:
    assert not verify(answer, expected)


def test_mathematics_is_compared_in_any_thread() -> None:
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(verify, ["0.5", "2/4", "0.50", r"\frac12"], ["1/2"] * 4))
