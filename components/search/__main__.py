"""Container entry: `python -m components.search --help` does the whole search."""

from components.core.runtime.entry import main
from components.search.declarations import SEARCH

main(SEARCH)
