"""Bytes that changed in a store: noticed by whoever uses them and by `verify`, named, and never used.

A small history is made for real: a stage that has finished, another that was interrupted, and their run. Then one
object is changed in one way, and everything is looked at as a fresh process on another machine would.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import CorruptArtifact, StoreError
from components.core.runtime.context import Interrupted
from components.core.runtime.runner import run_stage, stage_key
from components.core.store.artifact_store import blob_path, manifest_path
from components.core.store.store import Store, open_store, record_path
from components.core.store.verification import find_faults
from tests.components.core.fake_stage import STAGE, FakeConfig, numbers_folder
from tests.components.core.runtime.test_runner import Events
from tests.s3_server import BUCKET, S3Server

KINDS = {STAGE.name: {name: output.kind for name, output in STAGE.outputs.items()}}
FINISHED, STOPPED = FakeConfig(factor=3), FakeConfig(factor=5)


def letter(data: bytes) -> int:
    """Place of a letter or digit near the middle: a change there changes what JSON says."""
    return next((index for index in range(len(data) // 2, len(data)) if data[index : index + 1].isalnum()), 0)


def flipped(data: bytes, index: int, mask: int = 1) -> bytes:
    return data[:index] + bytes([data[index] ^ mask]) + data[index + 1 :]


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "first bit": lambda data: flipped(data, 0),
    "middle bit": lambda data: flipped(data, letter(data)),
    "last bit": lambda data: flipped(data, len(data) - 1),
    "one byte inverted": lambda data: flipped(data, letter(data), 0xFF),
    "one byte lost": lambda data: data[: letter(data)] + data[letter(data) + 1 :],
    "one byte doubled": lambda data: data[: letter(data)] + data[letter(data) :][:1] + data[letter(data) :],
    "truncated by one": lambda data: data.rstrip()[:-1],
    "truncated by half": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "a byte appended": lambda data: data + b"x",
    "twice": lambda data: data + data,
    "zeros": lambda data: bytes(len(data)),
    "a hole": lambda data: data[: len(data) // 3] + bytes(len(data) // 3 + 1) + data[2 * (len(data) // 3) + 1 :],
    "backwards": lambda data: data[::-1],
    "another encoding": lambda data: b"\xff\xfe" + data.decode().encode("utf-16-le"),
}


def changed(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = to

    return change


def without(*path: str) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        del document[path[-1]]

    return change


OTHER = "0123456789abcdef" * 4
EDITS: dict[str, dict[str, Callable[[Any], None]]] = {
    "stage record": {
        "another artifact": changed("outputs", "total", to=OTHER),
        "an output more": changed("outputs", "more", to=OTHER),
        "no outputs": changed("outputs", to={}),
        "another input": changed("inputs", "numbers", to=OTHER),
        "another setting": changed("config", "factor", to=4),
        "another code": changed("code", to=OTHER),
        "another library": changed("libraries", "torch", to="9"),
        "another stage": changed("stage", to="sft"),
        "another key": changed("key", to=OTHER),
        "another result": changed("result", "total", to=31),
        "another time": changed("seconds", to=0.5),
        "another seal": changed("sha256", to=OTHER),
        "no seal": without("sha256"),
        "no key": without("key"),
        "a field of its own": changed("note", to="mine"),
    },
    "output manifest": {
        "another kind": changed("kind", to="data"),
        "an unknown kind": changed("kind", to="archive"),
        "another file": changed("files", "total.json", "sha256", to=OTHER),
        "another size": changed("files", "total.json", "size", to=1),
        "a negative size": changed("files", "total.json", "size", to=-1),
        "a file more": changed("files", "more.json", to={"sha256": OTHER, "size": 1}),
        "a file less": without("files", "total.json"),
        "a file outside": changed("files", "../total.json", to={"sha256": OTHER, "size": 1}),
        "a digest that is a path": changed("files", "total.json", "sha256", to="../../../etc/passwd"),
        "a fact more": changed("metadata", "rows", to=1),
    },
    "run record": {
        "another source": changed("sources", "numbers", to=OTHER),
        "another status": changed("status", to="failed"),
        "another name": changed("run", to="run-2"),
        "no sources": without("sources"),
        "no seal": without("sha256"),
    },
    "stage document": {
        "another key": changed("key", to=OTHER),
        "another label": changed("label", to="two"),
        "cached": changed("cached", to=True),
    },
    "resume list": {
        "another file": changed("files", "state.json", "sha256", to=OTHER),
        "a file less": without("files", "state.json"),
        "a file more": changed("files", "more.json", to={"sha256": OTHER, "size": 1}),
        "no seal": without("sha256"),
    },
}


def edit(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    """A change of a JSON document that leaves it JSON."""

    def edited(data: bytes) -> bytes:
        document = json.loads(data)
        change(document)
        return json.dumps(document).encode()

    return edited


class World:
    """A store with a history, and where its objects are."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self.folder = uri, folder
        store = self.opened("here")
        self.source = numbers_folder(folder / "numbers", 1, 2, 3, 4)
        self.inputs = {"numbers": store.put_folder(self.source, "data").digest}
        record = run_stage(STAGE, FINISHED, self.inputs, store=store, label="one", run="run-1", reporter=Events())
        with pytest.raises(Interrupted):
            run_stage(STAGE, STOPPED, self.inputs, store=store, reporter=Events(stop_after=2))
        store.put_document("runs/run-1/run.json", {"run": "run-1", "status": "running", "sources": self.inputs})
        self.key, self.output = record.key, record.outputs["total"]
        self.stopped = stage_key(STAGE, STOPPED, self.inputs)
        (read,) = store.manifest(self.inputs["numbers"]).files.values()
        (made,) = store.manifest(self.output).files.values()
        point = f"resume/{self.stopped}/000000002"
        self.paths = {
            "input blob": blob_path(read.sha256),
            "output blob": blob_path(made.sha256),
            "input manifest": manifest_path(self.inputs["numbers"]),
            "output manifest": manifest_path(self.output),
            "stage record": record_path(self.key),
            "run record": "runs/run-1/run.json",
            "stage document": "runs/run-1/stages/one.json",
            "resume point": f"{point}/state.json",
            "resume list": f"{point}.json",
        }
        self.names = {
            "input blob": {read.sha256, self.inputs["numbers"]},
            "output blob": {made.sha256, self.output},
            "input manifest": {self.inputs["numbers"]},
            "output manifest": {self.output},
            "stage record": {self.key},
            "run record": {self.paths["run record"]},
            "stage document": {self.paths["stage document"]},
            "resume point": {point},
            "resume list": {point},
        }

    def opened(self, machine: str = "there") -> Store:
        """The store as a fresh process on a machine sees it."""
        return open_store(self.uri, local=self.folder / "local" / machine)

    def use(self, what: str, noticed: bool = True) -> None:
        """Use an object as the platform does: its damage is named, and what comes out is right."""
        {
            "input blob": self.use_input,
            "input manifest": self.use_input,
            "output blob": self.use_output,
            "output manifest": self.use_output,
            "stage record": self.use_output,
            "run record": self.use_document,
            "stage document": self.use_document,
            "resume point": self.use_point,
            "resume list": self.use_point,
        }[what](what, noticed)

    def use_input(self, what: str, noticed: bool) -> None:
        with pytest.raises((CorruptArtifact, StoreError), match=self.inputs["numbers"][:12]):
            run_stage(STAGE, FakeConfig(factor=7), self.inputs, store=self.opened(), reporter=Events())
        assert self.opened().stage_record(stage_key(STAGE, FakeConfig(factor=7), self.inputs)) is None
        store = self.opened()
        with pytest.raises((CorruptArtifact, StoreError)):
            store.verify(self.inputs["numbers"])
        assert store.put_folder(self.source, "data").digest == self.inputs["numbers"]

    def use_output(self, what: str, noticed: bool) -> None:
        events, store = Events(), self.opened()
        record = run_stage(STAGE, FINISHED, self.inputs, store=store, reporter=events)
        assert "cached" not in events.types
        assert (record.outputs, record.result) == ({"total": self.output}, {"total": 30})
        told = [event["text"] for event in events.seen if event["type"] == "note"]
        assert bool(told) is noticed
        if noticed:
            assert (self.key if what == "stage record" else self.output)[:12] in told[0]
        assert json.loads((store.fetch(self.output) / "total.json").read_text()) == 30

    def use_document(self, what: str, noticed: bool) -> None:
        path = self.paths[what]
        with pytest.raises(CorruptArtifact, match=path):
            self.opened().document(path)
        assert self.opened().read_document_or_none(path) is None
        self.opened().put_document(path, {})

    def use_point(self, what: str, noticed: bool) -> None:
        events = Events()
        record = run_stage(STAGE, STOPPED, self.inputs, store=self.opened(), reporter=events)
        assert events.steps == [1, 2, 3, 4]
        assert record.result == {"total": 50}
        assert ("note" in events.types) is (noticed and self.opened().backend.folder is not None)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(str(tmp_path / "store"), tmp_path)
    assert find_faults(made.opened(), KINDS) == {}
    yield made
    assert find_faults(made.opened(), KINDS) == {}  # whatever was damaged has been made anew


OBJECTS = (
    "input blob",
    "output blob",
    "input manifest",
    "output manifest",
    "stage record",
    "run record",
    "stage document",
    "resume point",
    "resume list",
)
CASES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    **{f"{what}: {how}": (what, do) for what in OBJECTS for how, do in BYTES.items()},
    **{f"{what}: {how}": (what, edit(do)) for what, edits in EDITS.items() for how, do in edits.items()},
}


def test_there_are_at_least_a_hundred_kinds() -> None:
    assert len(CASES) >= 100


@pytest.mark.parametrize("case", CASES)
def test_changed_bytes_are_noticed_named_and_not_used(world: World, case: str) -> None:
    what, change = CASES[case]
    file = Path(world.uri, world.paths[what])
    data = file.read_bytes()
    assert change(data) != data
    file.chmod(0o644)
    file.write_bytes(change(data))
    assert world.names[what] <= set(find_faults(world.opened(), KINDS))
    world.use(what)


def linked_copy(file: Path) -> None:
    """The right bytes, behind a link to a place that anybody may write to."""
    twin = file.with_name("twin")
    target = file.parents[5] / twin.name
    shutil.copy(file, target)
    file.unlink()
    file.symlink_to(target)


def linked_elsewhere(file: Path) -> None:
    file.unlink()
    file.symlink_to("/etc/hostname")


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def pipe(file: Path) -> None:
    """Reading it would never end."""
    file.unlink()
    os.mkfifo(file)


def unreadable(file: Path) -> None:
    file.chmod(0)


PLACES = {
    "a link to a copy": linked_copy,
    "a link elsewhere": linked_elsewhere,
    "a link to nothing": dangling,
    "a folder": folder,
    "a pipe": pipe,
    "not to be read": unreadable,
}


@pytest.mark.parametrize("how", PLACES)
@pytest.mark.parametrize("what", OBJECTS[:7])
def test_only_plain_files_are_taken(world: World, what: str, how: str) -> None:
    if how == "not to be read" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    PLACES[how](Path(world.uri, world.paths[what]))
    if how != "a folder" or "blob" in what or "manifest" in what:  # an empty folder is nothing, unless something is due
        assert world.names[what] & set(find_faults(world.opened(), KINDS))
    world.use(what)


@pytest.mark.parametrize("what", ["input blob", "output blob", "input manifest", "output manifest"])
def test_a_deleted_object_is_named_by_what_needs_it(world: World, what: str) -> None:
    Path(world.uri, world.paths[what]).unlink()
    assert world.names[what] & set(find_faults(world.opened(), KINDS))
    world.use(what)


@pytest.mark.parametrize("what", ["stage record", "resume point", "resume list"])
def test_without_its_record_a_result_is_made_anew(world: World, what: str) -> None:
    Path(world.uri, world.paths[what]).unlink()
    world.use(what, noticed=what == "resume point")


SWAPS = [("input blob", "output blob"), ("input manifest", "output manifest"), ("run record", "stage document")]


@pytest.mark.parametrize(("one", "other"), SWAPS)
def test_exchanged_objects_are_both_noticed(world: World, one: str, other: str) -> None:
    first, second = (Path(world.uri, world.paths[what]) for what in (one, other))
    first.rename(first.with_name("aside"))
    second.rename(first)
    first.with_name("aside").rename(second)
    assert world.names[one] | world.names[other] <= set(find_faults(world.opened(), KINDS))
    world.use(one)
    if "input" in one:
        world.use(other)
    else:
        world.use_document(other, True)


def test_records_of_two_computations_cannot_be_exchanged(world: World) -> None:
    other = run_stage(STAGE, FakeConfig(factor=2), world.inputs, store=world.opened(), reporter=Events())
    shutil.copy(Path(world.uri, record_path(other.key)), Path(world.uri, record_path(world.key)))
    assert set(find_faults(world.opened(), KINDS)) == {world.key}
    world.use("stage record")


def test_resume_points_of_two_computations_cannot_be_exchanged(world: World) -> None:
    config = FakeConfig(factor=2)
    with pytest.raises(Interrupted):
        run_stage(STAGE, config, world.inputs, store=world.opened(), reporter=Events(stop_after=2))
    ours = Path(world.uri, "resume", world.stopped)
    shutil.rmtree(ours)
    shutil.copytree(Path(world.uri, "resume", stage_key(STAGE, config, world.inputs)), ours)
    assert set(find_faults(world.opened(), KINDS)) == world.names["resume point"]
    world.use("resume point")


def test_a_record_with_a_good_seal_and_an_artifact_of_the_wrong_kind_is_not_used(world: World) -> None:
    """Sealed by somebody who knows how; what it names is no output of the stage."""
    store = world.opened()
    record = store.stage_record(world.key)
    assert record is not None
    store.backend.delete(record_path(world.key))
    store.put_stage_record(record.model_copy(update={"outputs": {"total": world.inputs["numbers"]}}))
    assert set(find_faults(world.opened(), KINDS)) == {world.key}
    events = Events()
    made = run_stage(STAGE, FINISHED, world.inputs, store=world.opened(), reporter=events)
    assert "cached" not in events.types
    assert made.outputs == {"total": world.output}


def test_a_blob_that_nothing_names_is_checked_too(world: World) -> None:
    stray = Path(world.uri, blob_path(OTHER))
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"anything")
    odd = Path(world.uri, "blobs", "sha256", "readme")
    odd.touch()
    assert set(find_faults(world.opened(), KINDS)) == {OTHER, "readme"}
    stray.unlink()
    odd.unlink()


def beside(file: Path, more: Callable[[Path], None]) -> None:
    """The right bytes, and something else in their folder."""
    shutil.copy(file.parent / "aside", file)
    more(file.parent / "more")


COPIES: Mapping[str, Callable[[Path], object]] = {
    "changed": lambda file: file.write_bytes(b"31"),
    "lengthened": lambda file: file.write_bytes(b"30 "),
    "emptied": lambda file: file.write_bytes(b""),
    "removed": lambda file: None,
    "a link to a copy": lambda file: file.symlink_to(shutil.copy(file.parent / "aside", file.parents[1] / "twin")),
    "a link elsewhere": lambda file: file.symlink_to("/etc/hostname"),
    "a file beside it": lambda file: beside(file, lambda more: more.touch()),
    "a link beside it": lambda file: beside(file, lambda more: more.symlink_to("/")),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_changed_working_copy_is_made_anew(world: World, how: str) -> None:
    copy = world.opened().fetch(world.output)
    file, aside = copy / "total.json", copy / "aside"
    file.rename(aside)  # another file in its place: the copy is a link to the blob
    COPIES[how](file)
    aside.unlink()
    assert set(find_faults(world.opened(), KINDS)) == {world.output}
    assert (world.opened().fetch(world.output) / "total.json").read_text() == "30"
    assert [path.name for path in copy.iterdir()] == ["total.json"]


REMOTE = ("first bit", "truncated by half", "emptied", "a byte appended")


@pytest.mark.parametrize("how", [*REMOTE, "deleted"])
def test_the_same_behind_s3(s3_uri: str, s3_server: S3Server, tmp_path: Path, how: str) -> None:
    """Bytes change, and the digest among the object's metadata stays."""
    world = World(s3_uri, tmp_path)
    backend = world.opened().backend
    client, prefix = s3_server.client(), s3_uri.rpartition("/")[2]
    assert find_faults(world.opened(), KINDS) == {}
    for what in OBJECTS:
        path = world.paths[what]
        if how == "deleted" and "record" not in what and "document" not in what and "resume" not in what:
            backend.delete(path)
            assert world.names[what] & set(find_faults(world.opened(), KINDS))
        elif how == "deleted":
            continue
        else:
            data = BYTES[how](backend.get(path) or b"")
            metadata = client.stat_object(BUCKET, f"{prefix}/{path}").metadata.get("x-amz-meta-sha256", "")
            client.put_object(BUCKET, f"{prefix}/{path}", BytesIO(data), len(data), metadata={"sha256": metadata})
            assert world.names[what] <= set(find_faults(world.opened(), KINDS))
        world.use(what)
        assert find_faults(world.opened(), KINDS) == {}
        if what == "resume point":
            backend.delete(record_path(world.stopped))
            with pytest.raises(Interrupted):
                run_stage(STAGE, STOPPED, world.inputs, store=world.opened(), reporter=Events(stop_after=2))
            shutil.rmtree(tmp_path / "local" / "there" / "resume")
