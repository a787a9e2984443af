"""The command `tessera`, also `python -m pipelines`: Ctrl-C ends it without a traceback, also while it still loads."""

import sys

from components.core.base.errors import RunStopped


def main() -> None:
    """Load and run the command."""
    try:
        from pipelines.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(RunStopped.exit_code)


if __name__ == "__main__":
    main()
