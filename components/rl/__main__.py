"""Container entry: `python -m components.rl --help`."""

from components.core.runtime.entry import main
from components.rl.config import STAGE

main(STAGE)
