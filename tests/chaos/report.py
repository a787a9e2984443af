"""What a campaign of kills has seen."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Of one kind of run.

    Attributes:
        kills: by kind, those that struck a process at work.
        runs: that came to their end, and to the same end as without kills.
        failures: seed of the run to replay, the kills so far, and what was wrong.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "kills": self.kills.total(),
            "by_kind": dict(sorted(self.kills.items())),
            "runs_completed": self.runs,
            "failures": self.failures,
            "seconds": round(self.seconds, 1),
        }


class Clock:
    """Time that a campaign has."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def is_up(self) -> bool:
        """Whether no further run is to be begun."""
        return time.monotonic() >= self._end
