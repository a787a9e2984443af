"""Is an answer right? Exactly for short answers, mathematically where they are formulas."""

import logging
import re
from fractions import Fraction

_SPACE = re.compile(r"\s+")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_NUMBER = re.compile(r"[-+]?(\d[\d,]*(\.\d+)?|\.\d+)(/\d+)?%?|[-+]?\\[dt]?frac(\{\d+\}\{\d+\}|\d\d)|\\sqrt\{\d+\}")
_DECIMAL = re.compile(r"[-+]?(\d[\d,]*(\.\d+)?|\.\d+)")
_COSTLY = re.compile(r"[\^!].*[\^!]|!|\d{40}|\^\{?-?\d{4}")
"""Towers of powers, factorials and huge numbers: working them out could take longer than the universe has."""
MAX_FORMULA_CHARS = 300


def verify(answer: str, expected: str) -> bool:
    r"""Whether `answer` equals `expected`, by text or as mathematics.

    A number is expected as a number: a sum that comes to it, or a chain of equations that ends with it, is no answer.

    Args:
        answer: what the model gave; the last `\boxed{…}` of it counts where there is one.
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
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every comparison that has no time limit
    from math_verify import parse  # slow to import, and seldom needed
    from math_verify import verify as equal

    parsed = [parse(f"${text}$", parsing_timeout=None) for text in (wanted, given)]
    return bool(equal(*parsed, timeout_seconds=None))


def _normal(text: str) -> str:
    """Without dollar signs, outer space and full stop, inner space folded."""
    return _SPACE.sub(" ", text).strip().strip("$").strip().removesuffix(".")
