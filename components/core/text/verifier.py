"""Checks an answer against the expected one: as text, as a number, or as mathematics."""

import logging
import re
from fractions import Fraction

_SPACE = re.compile(r"\s+")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_NUMBER = re.compile(r"[-+]?(\d[\d,]*(\.\d+)?|\.\d+)(/\d+)?%?|[-+]?\\[dt]?frac(\{\d+\}\{\d+\}|\d\d)|\\sqrt\{\d+\}")
_DECIMAL = re.compile(r"[-+]?(\d[\d,]*(\.\d+)?|\.\d+)")
_COSTLY = re.compile(r"[\^!].*[\^!]|!|\d{40}|\^\{?-?\d{4}")
"""Towers of powers, factorials and huge numbers: evaluating them could take practically forever."""
MAX_FORMULA_CHARS = 300


def verify(answer: str, expected: str) -> bool:
    r"""Whether `answer` equals `expected`, by text or as mathematics.

    Where a number is expected, only a number is right: neither a sum with that value nor a chain of equations is.

    Args:
        answer: the answer of the model; where it has `\boxed{…}`, the content of the last one counts.
        expected: the right answer.
    """
    boxed = _BOXED.findall(answer)
    given, wanted = _normal(boxed[-1] if boxed else answer), _normal(expected)
    if given == wanted:
        return True
    if _DECIMAL.fullmatch(wanted) and _DECIMAL.fullmatch(given):
        return Fraction(given.replace(",", "")) == Fraction(wanted.replace(",", ""))
    if _NUMBER.fullmatch(wanted):
        return bool(_NUMBER.fullmatch(given)) and _equal(given, wanted)
    if not given or len(given) > MAX_FORMULA_CHARS or _COSTLY.search(given) or wanted.isalpha():
        return False
    return _equal(given, wanted)


def _equal(given: str, wanted: str) -> bool:
    """Mathematical equality."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about every comparison without a time limit
    from math_verify import parse  # slow to import, and seldom needed
    from math_verify import verify as equal

    parsed = [parse(f"${text}$", parsing_timeout=None) for text in (wanted, given)]
    return bool(equal(*parsed, timeout_seconds=None))


def _normal(text: str) -> str:
    """The text without dollar signs, outer space and full stop; inner space folded."""
    return _SPACE.sub(" ", text).strip().strip("$").strip().removesuffix(".")
