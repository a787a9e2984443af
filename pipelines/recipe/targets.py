"""What a run should reach, as its recipe says."""

from pydantic import Field

from components.core.base.config import Config


class Targets(Config):
    """Numbers that a run should reach, each the smallest that is good enough; null has none. The report judges them."""

    speed_up: float | None = Field(default=None, gt=0)
    """Tokens per second, child over parent."""
    accuracy_retained: float | None = Field(default=None, gt=0)
    """Accuracy on the standard problems, distilled child over parent."""
    format_after_sft: float | None = Field(default=None, ge=0, le=1)
    """Fraction of answers with the format of their mode after SFT, in the worse of the two modes."""
    thinking_gain: float | None = Field(default=None, ge=-1, le=1)
    """Accuracy after SFT, thinking on minus off; on the hard problems if there are any."""
    rl_gain: float | None = Field(default=None, ge=-1, le=1)
    """Accuracy with thinking on, RL minus SFT; on the hard problems if there are any."""
    format_after_rl: float | None = Field(default=None, ge=0, le=1)
    """Fraction of answers with the format of their mode after RL, in the worse of the two modes."""
