"""Container entry: `python -m components.eval --help`."""

from components.core.runtime.entry import main
from components.eval.config import STAGE

main(STAGE)
