"""The points of the code at which a fault can be injected, and the state in which each is reached."""

from collections.abc import Mapping
from types import MappingProxyType

POINTS: Mapping[str, str] = MappingProxyType(
    {
        "object.put": "an object is about to be written",
        "object.part": "a part of a file is about to be written",
        "object.named": "the object is there; in a folder it may not be on the disk",
        "object.flushed": "it is on the disk",
        "object.get": "an object of a bucket is about to be read",
        "object.delete": "an object is about to be removed",
        "artifact.blobs": "all blobs of an artifact are there, the manifest is not",
        "artifact.named": "the manifest is there",
        "copy.begun": "a working copy has its folder, under another name",
        "copy.filled": "it has all files",
        "copy.named": "the working copy is there",
        "record.write": "the record of a stage is about to be written",
        "record.written": "it is there",
        "mirror.begun": "a resume point is about to be sent to a remote store",
        "mirror.files": "its files are there, the list that makes it count is not",
        "mirror.list": "the list is there",
        "mirror.trimmed": "older points are gone",
        "pull.filled": "a resume point of a remote store is here, under another name",
        "pull.cleared": "what was in its place is gone",
        "pull.named": "the resume point is here",
        "resume.drop": "resume points of a finished stage are about to go",
        "resume.hidden": "they do not count any more",
        "resume.dropped": "those on this machine are gone",
        "point.begun": "a resume point has its folder, under another name",
        "point.written": "it has all files",
        "point.cleared": "what was in its place is gone",
        "point.placed": "it has its name, the list that makes it count is not there",
        "point.named": "it counts",
        "point.mirrored": "a remote store has it",
        "point.trimmed": "older points are gone",
        "event": "an event is about to be written",
        "stage.begun": "the key of a stage is known, nothing is written",
        "stage.alone": "no other process of this machine works on the key",
        "stage.fetched": "its inputs are here",
        "stage.computed": "it has run, nothing of it is stored",
        "stage.stored": "its outputs are stored",
        "stage.recorded": "its record is stored",
        "stage.rested": "its resume points are gone",
        "stage.settle": "the run is about to record the stage",
        "stage.settled": "the run has it",
        "rank.begun": "a training process has joined the others",
        "rank.computed": "a training process has done its work",
        "run.begun": "a run has its record",
        "run.ending": "the record of a run is about to be closed",
    }
)
"""The state when it is reached, by the name of the point."""
