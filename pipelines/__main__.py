"""The command `tessera`, also `python -m pipelines`: Ctrl-C ends it without a traceback, also while it still loads."""

import sys


def main() -> None:
    """Load and run the command; whatever takes time to load is loaded here, where Ctrl-C is caught."""
    try:
        from pipelines.cli import main as run

        run()
    except KeyboardInterrupt:
        from components.core.base.errors import RunStopped

        sys.exit(RunStopped.exit_code)


if __name__ == "__main__":
    main()
