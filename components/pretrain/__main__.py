"""Container entry: `python -m components.pretrain --help`."""

from components.core.runtime.entry import main
from components.pretrain.config import STAGE

main(STAGE)
