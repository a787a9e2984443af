"""Runs one stage on a user's own files: the container entry, and what `tessera stage` does."""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from components.core.base.errors import InputError, TesseraError
from components.core.runtime.context import Interrupted
from components.core.runtime.placement import Placement
from components.core.runtime.runner import INTERRUPTED_EXIT_CODE, run_stage
from components.core.runtime.stage import Stage
from components.core.store.manifest import Kind
from components.core.store.store import StageRecord, Store, open_store

DIGEST_LENGTH = 64


def run_alone(
    stage: Stage,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Sequence[str]],
    outputs: Mapping[str, str],
    store: Store,
) -> StageRecord:
    """Run a stage on files, with the same cache and resume as in a pipeline.

    Args:
        stage: what to run.
        settings: its configuration; `placement` may stand beside its keys.
        inputs: for each input the folders, files, artifact digests or `store-uri#digest` that it reads.
        outputs: where each output is to be written: a folder that does not exist or is empty.
        store: takes everything in between.

    Raises:
        InputError: an input is not there, an output folder is not empty, or a name is unknown.
    """
    settings = dict(settings)
    placement = Placement.parse(settings.pop("placement", None) or {}, where="placement")
    config = stage.config.parse(settings)
    for name, target in outputs.items():
        if name not in stage.outputs:
            raise InputError(f"stage {stage.name} has no output {name!r}", hint=f"it makes {', '.join(stage.outputs)}")
        if Path(target).exists() and (not Path(target).is_dir() or any(Path(target).iterdir())):
            raise InputError(f"output {name}: {target} is there already", hint="name a folder that does not exist")
    digests: dict[str, str | list[str]] = {}
    for name, values in inputs.items():
        if name not in stage.inputs:
            raise InputError(f"stage {stage.name} has no input {name!r}", hint=f"it takes {', '.join(stage.inputs)}")
        declared = stage.inputs[name]
        found = [artifact_digest(value, declared.kind, store) for value in values]
        digests[name] = found if declared.many else found[0]
    record = run_stage(stage, config, digests, store=store, placement=placement)
    for name, target in outputs.items():
        if name in record.outputs:
            shutil.copytree(
                store.fetch(record.outputs[name]), target, dirs_exist_ok=True, copy_function=shutil.copyfile
            )
    return record


def artifact_digest(value: str, kind: Kind, store: Store) -> str:
    """The digest of an input: itself if it is one, else that of the files at a path, which are put into the store.

    Raises:
        InputError: there is nothing at the path.
    """
    if len(value) == DIGEST_LENGTH and all(letter in "0123456789abcdef" for letter in value):
        return value
    uri, mark, digest = value.partition("#")
    if mark:
        source = open_store(uri)
        return store.put_folder(source.fetch(digest), kind).digest
    path = Path(value)
    if path.is_dir():
        return store.put_folder(path, kind).digest
    if path.is_file():
        folder = store.local / "tmp" / f"input-{path.name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copy(path, folder / path.name)
        digest = store.put_folder(folder, kind).digest
        shutil.rmtree(folder)
        return digest
    raise InputError(f"input {value} is not there", hint="give a folder, a file, an artifact digest or store#digest")


def main(stage: Stage, arguments: Sequence[str] | None = None) -> None:
    """The command line of a stage's container."""
    parser = argparse.ArgumentParser(prog=f"python -m components.{stage.name}", description=stage.doc)
    parser.add_argument("--config", type=Path, help="YAML or JSON file with the stage's configuration")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=PATH", help="an input, once for each")
    parser.add_argument("--output", action="append", default=[], metavar="NAME=PATH", help="where to write an output")
    parser.add_argument("--store", default=".tessera", help="folder or s3://bucket/prefix")
    options = parser.parse_args(arguments)
    try:
        settings = yaml.safe_load(options.config.read_text(encoding="utf-8")) or {} if options.config else {}
        inputs: dict[str, list[str]] = {}
        for pair in options.input:
            name, _, value = pair.partition("=")
            inputs.setdefault(name, []).append(value)
        outputs = dict(pair.split("=", 1) for pair in options.output)
        record = run_alone(stage, settings, inputs, outputs, open_store(options.store))
    except TesseraError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)
    except Interrupted:
        sys.exit(INTERRUPTED_EXIT_CODE)
    for name, digest in record.outputs.items():
        sys.stdout.write(f"{name} {digest}\n")
