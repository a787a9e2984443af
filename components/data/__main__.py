"""Container entry: `python -m components.data --help`."""

from components.core.runtime.entry import main
from components.data.config import STAGE

main(STAGE)
