"""Container entry: `python -m components.sft --help`."""

from components.core.runtime.entry import main
from components.sft.config import STAGE

main(STAGE)
