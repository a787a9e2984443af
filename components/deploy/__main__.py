"""Container entry: `python -m components.deploy --help`."""

from components.core.runtime.entry import main
from components.deploy.config import STAGE

main(STAGE)
