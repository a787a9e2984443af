"""Compares formulas with math-verify in worker processes that a limit of processor time ends.

math-verify has no time limit outside the main thread, and some formulas keep it busy for hours.
"""

import sys

from components.core.text.judges.worker_pool import LIMIT_S, WorkerPool, serve


class FormulaPool:
    """Worker processes that compare formulas; usable from any thread."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._pool = WorkerPool("components.core.text.formulas", "comparing", limit_s)

    def equal(self, first: str, second: str) -> bool:
        """Whether two formulas are mathematically equal; the order makes no difference.

        Raises:
            JudgeFailed: the comparison needs more processor time or memory than it may use.
        """
        return bool(self._pool.ask([first, second], f"{first[:80]!r} against {second[:80]!r}"))

    def close(self) -> None:
        """End the idle workers."""
        self._pool.close()


def _compare(first: str, second: str) -> bool:
    """Mathematical equality, in either order: math-verify treats its reference and its target differently."""
    from math_verify import parse, verify  # slow to import, and only workers need it

    try:
        left, right = (parse(f"${text}$", parsing_timeout=None, raise_on_error=True) for text in (first, second))
        pairs = ((left, right), (right, left))
        return any(verify(*pair, timeout_seconds=None, raise_on_error=True) for pair in pairs)
    except MemoryError:
        raise
    except Exception:  # whatever SymPy cannot read or compare is not equal
        return False


if __name__ == "__main__":
    serve(
        float(sys.argv[1]),
        lambda pair: _compare(*pair),
        prepare=lambda: _compare("x + 1", "1 + x"),  # loads the grammar
    )
