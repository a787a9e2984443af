"""Container entry: `python -m components.search --help`."""

from components.core.entry import main
from components.search.config import STAGES

main(*STAGES)
