"""Checks an answer against the expected one: as text, as a number, or as mathematics."""

import functools
import math
import re
from collections.abc import Mapping
from fractions import Fraction

from components.core.text.formulas import FormulaPool

MAX_FORMULA_CHARS = 500
"""Longer answers and expected answers are compared as text alone."""
MAX_EXPONENT = 1000
"""Largest power of ten in a number, so that its exact value has a reasonable number of digits."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(\w))")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)"))
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "﹣": "-", "－": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty "}
    | {"°": r"^\circ ", "²": "^{2}", "³": "^{3}", "≤": r"\le ", "≥": r"\ge ", "½": r"\frac{1}{2}", "∪": r"\cup "}
)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\left\s*\\?\.|\\right\s*\\?\.|\\left(?![a-z])|\\right(?![a-z])"), ""),
    (re.compile(r"(?<=\d)\\[!,;:](?=\d{3})"), ""),
    (re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*(and|or)\s*\}"), r" \1 "),
    (re.compile(r"\\[!,;:]|\\(?:q?quad|displaystyle|limits)(?![a-zA-Z])|~|\\ "), " "),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"√\s*(?:\(([^()]*)\)|(\w+))"), r"\\sqrt{\1\2}"),
    (re.compile(r"\\sqrt\s*(\w)"), r"\\sqrt{\1}"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\?\$"), ""),
    (re.compile(r"\s*\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})"), ""),
)
"""Spellings of the same thing, in the order in which they are rewritten; dollars and degrees are dropped."""
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(
    rf"(?<=[\w)}}%])\s*({_TEXT.pattern}(?:\s*\^\s*(?:\d|\{{\d\}}))?"
    r"|(?<=\d)\s+(?:[cmk]m|[mk]g|degrees?|dollars?|cents?|percent|hours?|minutes?|seconds?|meters?|feet|inches)"
    r"(?:\s*\^\s*(?:\d|\{\d\}))?)$"
)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_POWER = r"(?:[eE]([-+]?\d+)|\s*\\(?:times|cdot)\s*10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|(\d)))?"
_DECIMAL = re.compile(rf"([-+]?)\s*({_DIGITS}){_POWER}")
_RATIO = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<whole>\d+(?=\s*\\frac|\s+\d+\s*/))?\s*"
    rf"(?:\\frac\s*\{{\s*(?P<top>[-+]?{_DIGITS})\s*\}}\s*\{{\s*(?P<bottom>[-+]?{_DIGITS})\s*\}}"
    rf"|(?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS}))"
)
_ROOT = re.compile(r"([-+]?)\\sqrt\s*\{\s*(\d{1,30})\s*\}")
_INTEGER_POWER = re.compile(r"([1-9]\d{0,5})\s*\^\s*(?:\{\s*(-?\d{1,2})\s*\}|(\d))")
_CHOICE = re.compile(r"\(([A-Za-z])\)")
_ASSIGNED = re.compile(r"[A-Za-z]\s*(?:=|\\in(?![a-zA-Z]))\s*([^=]+)")
_BRACED = re.compile(r"\{([^{}]*)\}")
_LIST = re.compile(r"\s*,?\s+(?:and|or)\s+")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "pi", "arcsin", "arccos", "arctan", "min"}
_FUNCTIONS |= {"max", "gcd", "lcm", "mod", "inf", "sinh", "cosh", "tanh", "binom"}
_MATRIX = re.compile(r"\\(?:begin|end)\s*\{\w+\*?\}")
_WORD = re.compile(r"(?<![\\a-zA-Z])[^\W\d_]{3,}")
_OPERATOR_SPACE = re.compile(r"\s*([-+*/=<>(),^{}\[\]])\s*")
_SPACE = re.compile(r"\s+")

_POOL = FormulaPool()


def verify(answer: str, expected: str) -> bool:
    r"""Whether `answer` equals `expected`, by text or as mathematics.

    Where a number is expected, only a number is right: neither a sum with that value nor a chain of equations is. A
    unit counts where both have one, and 50% is 50 or 0.5.

    Args:
        answer: the answer of the model; where it has `\boxed{…}`, the content of the last one counts.
        expected: the right answer.

    Raises:
        JudgeFailed: comparing the two as formulas takes too long, which says nothing about the answer.
    """
    given, wanted = _normal(boxed(answer)), _normal(boxed(expected))
    if not given or not wanted:
        return False
    if _folded(given) == _folded(wanted):
        return True
    if max(len(given), len(wanted)) > MAX_FORMULA_CHARS:
        return False
    (given, unit), (wanted, wanted_unit) = _without_unit(given), _without_unit(wanted)
    if unit and wanted_unit and unit != wanted_unit:
        return False
    given, wanted = _values_of_assignments(given, wanted)
    values = _numbers(wanted)
    if values:
        return not values.isdisjoint(_numbers(given) or _power(given))
    if _power(wanted) and (given_values := _numbers(given) or _power(given)):
        return not given_values.isdisjoint(_power(wanted))
    if _folded(given) == _folded(wanted):
        return True
    given, wanted = _LIST.sub(", ", given), _LIST.sub(", ", wanted)
    return _is_formula(given) and _is_formula(wanted) and _equal(given, wanted)


def boxed(text: str) -> str:
    r"""The content of the last `\boxed{…}`, nothing where its brace is not closed; the whole text without a box."""
    found = list(_BOX.finditer(text))
    if not found:
        return text
    if found[-1][1]:
        return found[-1][1]
    depth, start = 1, found[-1].end()
    for at in range(start, len(text)):
        if text[at] in "{}" and text[at - 1] != "\\":
            depth += 1 if text[at] == "{" else -1
        if depth == 0:
            return text[start:at]
    return ""


@functools.lru_cache(maxsize=1 << 14)
def _equal(given: str, wanted: str) -> bool:
    """Mathematical equality; models give the same answer many times."""
    return _POOL.equal(given, wanted)


def _normal(text: str) -> str:
    """One spelling of a text: without math delimiters, layout and full stop; inner space folded."""
    text = _SPACE.sub(" ", text.translate(_UNICODE)).strip().removesuffix(".").rstrip()
    for start, end in _DELIMITERS:
        if text.startswith(start) and text.endswith(end) and len(text) >= len(start) + len(end):
            text = text[len(start) : len(text) - len(end)].strip()
    for pattern, rewritten in _REWRITES:
        text = pattern.sub(rewritten, text)
    text = _SPACE.sub(" ", text).strip().removesuffix(".").rstrip()
    whole = _TEXT.fullmatch(text)
    text = whole[1].strip() if whole else text
    braced = _BRACED.fullmatch(text)
    text = braced[1].strip() if braced else text
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


def _folded(text: str) -> str:
    """What texts are compared by: words without their case, no space around signs, no braces around one character."""
    text = _TEXT.sub(r"\1", text)
    if len(text) > 1 and not set(text) & set("\\^_=+*/<>0123456789"):
        text = text.casefold()
    return re.sub(r"\{(\w)\}", r"\1", _OPERATOR_SPACE.sub(r"\1", text)).strip()


def _without_unit(text: str) -> tuple[str, str]:
    """A value, and the unit after it; `percent` becomes a sign of the value."""
    found = _UNIT.search(text)
    if found is None or not found.start():
        return text, ""
    unit = re.sub(r"[\s{}]", "", _TEXT.sub(r"\1", found[1]))
    if re.search(r"\d", unit.split("^")[0]) or unit in ("and", "or"):
        return text, ""
    value = text[: found.start()].rstrip()
    return (value + "%", "") if unit == "percent" else (value, unit)


def _values_of_assignments(given: str, wanted: str) -> tuple[str, str]:
    """Both without `x =` where only one of them has it."""
    of_given, of_wanted = _ASSIGNED.fullmatch(given), _ASSIGNED.fullmatch(wanted)
    if of_given and "=" not in wanted and not of_wanted:
        return of_given[1].strip(), wanted
    if of_wanted and "=" not in given and not of_given:
        return given, of_wanted[1].strip()
    return given, wanted


def _numbers(text: str) -> set[Fraction]:
    """The exact values that a text may mean as a number; none where it is no number. A percentage has two."""
    if text.endswith("%"):
        return {value / scale for value in _numbers(text[:-1].rstrip()) for scale in (1, 100)}
    try:
        if found := _DECIMAL.fullmatch(text):
            exponent = int(found[3] or found[4] or found[5] or 0)
            if abs(exponent) > MAX_EXPONENT:
                return set()
            return {Fraction(found[1] + found[2].replace(",", "")) * Fraction(10) ** exponent}
        if found := _RATIO.fullmatch(text):
            return {_ratio(found.groupdict())}
    except (ZeroDivisionError, ValueError):
        pass
    return set()


def _ratio(parts: Mapping[str, str | None]) -> Fraction:
    """The value of a fraction or a mixed number."""
    top, bottom = (parts[a] or parts[b] or "" for a, b in (("top", "over"), ("bottom", "under")))
    value = Fraction(top.replace(",", "")) / Fraction(bottom.replace(",", ""))
    value += int(parts["whole"] or 0)
    return -value if parts["sign"] == "-" else value


def _power(text: str) -> set[Fraction]:
    """The value of the square root of a perfect square, or of a power of small whole numbers."""
    if found := _INTEGER_POWER.fullmatch(text):
        return {Fraction(int(found[1])) ** int(found[2] or found[3])}
    if (found := _ROOT.fullmatch(text)) and (root := math.isqrt(int(found[2]))) ** 2 == int(found[2]):
        return {Fraction(-root if found[1] == "-" else root)}
    return set()


def _is_formula(text: str) -> bool:
    """Whether a text is mathematics: words would be compared as products of their letters."""
    words = {word.lower() for word in _WORD.findall(_TEXT.sub(r" \1 ", _MATRIX.sub("", text)))}
    return words <= _FUNCTIONS and bool(text) and not text.isalpha()
