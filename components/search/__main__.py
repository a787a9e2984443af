"""Container entry: `python -m components.search --help` does the whole search."""

from components.core.entry import main
from components.search.config import SEARCH

main(SEARCH)
