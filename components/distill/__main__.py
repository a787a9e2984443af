"""Container entry: `python -m components.distill --help`."""

from components.core.runtime.entry import main
from components.distill.config import STAGE

main(STAGE)
