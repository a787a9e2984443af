"""The stage that scores FFN channels."""

from pathlib import Path

from pydantic import JsonValue

from components.core.runtime.context import StageContext
from components.search.config import ImportanceConfig
from components.search.library.calibration import calibration_batches, load_parent
from components.search.library.importance import channel_contributions, save_importance


def importance(
    config: ImportanceConfig, *, context: StageContext, out: Path, parent: Path, corpus: Path
) -> dict[str, JsonValue]:
    """Channel importance on calibration text. Source: arXiv 2411.19146, appendix A."""
    model = load_parent(parent, context, config.dtype)
    batches = calibration_batches(config, corpus, parent, "train", config.importance_batches)
    contributions = channel_contributions(model, batches, context)
    save_importance(contributions, out / "importance")
    return {"layers": len(contributions)}
