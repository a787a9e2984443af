"""A campaign of kills: `make chaos SECONDS=600 [SEED=1]`; exit code 1 where one was not survived.

Two counts, told apart: runs of one tiny stage (many a second, half of the time, folder and S3), and whole runs of the
small recipe beside this file, a quarter of which evaluate.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.chaos import tiny, whole
from tests.chaos.attempt import Place
from tests.chaos.report import Clock, Tally
from tests.s3_server import BUCKET, running_server

STORES = ("folder", "s3")
"""Where the tiny runs work, in turn."""


def main() -> None:
    """Run the campaign, print and write its report."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="time for the campaign")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="chooses what is killed, and when")
    parser.add_argument("--only", choices=["tiny", "whole"], help="one of the two counts alone")
    parser.add_argument("--replay", type=int, metavar="SEED", help="one run alone, by the seed of a failure")
    parser.add_argument("--store", choices=STORES, help="with --replay: where a tiny run works; else a whole run")
    parser.add_argument("--report", type=Path, default=Path("chaos.json"), help="where the report goes")
    parser.add_argument("--folder", type=Path, help="where to work; a run without kills is taken from an earlier time")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # the first else ignored in the background, by all that is started
        signal.signal(number, signal.default_int_handler)
    tallies = {"tiny": Tally(), "whole": Tally()}
    begun, folder = time.monotonic(), options.folder or Path(tempfile.mkdtemp(prefix="tessera-chaos-"))
    with contextlib.suppress(KeyboardInterrupt):  # what was seen until then is reported
        _campaign(options, folder, tallies)
    report = {
        "seed": options.seed,
        "seconds": round(time.monotonic() - begun, 1),
        "kills": sum(tally.kills.total() for tally in tallies.values()),
        "runs_completed": sum(tally.runs for tally in tallies.values()),
        **{name: tally.as_json() for name, tally in tallies.items()},
    }
    options.report.write_text(json.dumps(report, indent=1) + "\n")
    whole.say(f"{options.report}: {json.dumps(report)}")
    sys.exit(any(tally.failures for tally in tallies.values()))


def _campaign(options: argparse.Namespace, folder: Path, tallies: dict[str, Tally]) -> None:
    """What was asked for."""
    if options.replay is not None and options.store is None:
        whole.one(folder, whole.expect(folder), options.replay, tallies["whole"])
        return
    _tiny(options, folder, tallies["tiny"])
    if options.only != "tiny" and options.replay is None:
        seconds = options.seconds / (1 if options.only == "whole" else 2)
        whole.campaign(folder, Clock(seconds), options.seed, tallies["whole"])


def _tiny(options: argparse.Namespace, folder: Path, tally: Tally) -> None:
    """The tiny runs."""
    seconds = options.seconds / len(STORES) / (1 if options.only == "tiny" else 2)
    for kind in () if options.only == "whole" else STORES:
        with _place(kind, folder / kind) as place:
            if options.replay is None:
                tiny.campaign(kind, place, Clock(seconds), options.seed, tally)
                whole.say(f"tiny runs, {kind}: {tally.kills.total()} kills, {tally.runs} runs so far")
            elif kind == options.store:
                tiny.replay(kind, place, options.replay, tally)


@contextlib.contextmanager
def _place(kind: str, folder: Path) -> Iterator[Place]:
    """Where tiny runs work: a folder, or a server of their own."""
    folder.mkdir()
    if kind == "folder":
        yield Place(str(folder), folder, {})
        return
    with running_server(lambda: Path(tempfile.mkdtemp(dir=folder))) as server:
        os.environ.update(server.environment)
        yield Place(f"s3://{BUCKET}/{uuid.uuid4().hex}", folder / "runs", server.environment)


if __name__ == "__main__":
    main()
