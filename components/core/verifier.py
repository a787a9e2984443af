"""Is an answer right? Exactly for short answers, mathematically where they are formulas."""

import re

_SPACE = re.compile(r"\s+")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_PLAIN = re.compile(r"[\w.\-]*")


def verify(answer: str, expected: str) -> bool:
    r"""Whether `answer` equals `expected`, by text or as mathematics.

    Args:
        answer: what the model gave; the last `\\boxed{…}` of it counts where there is one.
        expected: the right answer.
    """
    boxed = _BOXED.findall(answer)
    given, wanted = _normal(boxed[-1] if boxed else answer), _normal(expected)
    if given == wanted:
        return True
    if not given or (_PLAIN.fullmatch(given) and _PLAIN.fullmatch(wanted) and given.isalnum() and wanted.isalnum()):
        return False
    from math_verify import parse  # slow to import, and seldom needed
    from math_verify import verify as equal

    parsed = [parse(f"${text}$", parsing_timeout=None) for text in (wanted, given)]
    return bool(equal(*parsed, timeout_seconds=None))


def _normal(text: str) -> str:
    """Without outer space and full stop, inner space folded."""
    return _SPACE.sub(" ", text).strip().removesuffix(".")
