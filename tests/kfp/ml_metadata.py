"""Reads from ML Metadata what Kubeflow's interface shows of a run: KFP's own API has no artifacts.

The Python package of ML Metadata takes only old interpreters, so the few messages that are read are declared here, with
the field numbers of its `metadata_store.proto`.
"""

from typing import Any, NamedTuple

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
from google.protobuf.descriptor_pb2 import FileDescriptorProto

MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "GetContextByTypeAndNameRequest": {"type_name": (1, "STRING"), "context_name": (2, "STRING")},
    "Context": {"id": (1, "INT64")},
    "GetContextByTypeAndNameResponse": {"context": (1, "Context")},
    "GetArtifactsByContextRequest": {"context_id": (1, "INT64")},
    "Value": {"int_value": (1, "INT64"), "double_value": (2, "DOUBLE"), "string_value": (3, "STRING")},
    "Property": {"key": (1, "STRING"), "value": (2, "Value")},
    "Artifact": {"uri": (3, "STRING"), "custom_properties": (5, "repeated Property"), "type": (8, "STRING")},
    "GetArtifactsByContextResponse": {"artifacts": (1, "repeated Artifact")},
}
"""Fields of each message, with number and type."""
REPEATED, PACKAGE = "repeated ", "ml_metadata"
ANSWER_S = 20.0


class Artifact(NamedTuple):
    """An artifact of a run; its name is that of the component's parameter."""

    name: str
    type: str
    uri: str
    metadata: dict[str, Any]


class MlMetadata:
    """The gRPC service of ML Metadata."""

    def __init__(self, address: str) -> None:
        self._channel, self._messages = grpc.insecure_channel(address), _messages()

    def artifacts(self, run_id: str) -> list[Artifact]:
        """The artifacts of a run of KFP."""
        found = self._call("GetContextByTypeAndName", type_name="system.PipelineRun", context_name=run_id)
        return [_artifact(each) for each in self._call("GetArtifactsByContext", context_id=found.context.id).artifacts]

    def _call(self, method: str, **fields: object) -> Any:
        request, answer = (self._messages[f"{PACKAGE}.{method}{kind}"] for kind in ("Request", "Response"))
        call = self._channel.unary_unary(
            f"/{PACKAGE}.MetadataStoreService/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=answer.FromString,
        )
        return call(request(**fields), timeout=ANSWER_S)


def _artifact(found: Any) -> Artifact:
    values = {each.key: each.value for each in found.custom_properties}
    metadata = {key: getattr(value, field.name) for key, value in values.items() for field, _ in value.ListFields()[:1]}
    return Artifact(metadata.pop("display_name", ""), found.type, found.uri, metadata)


def _messages() -> dict[str, Any]:
    """Classes of the messages, by their full name."""
    file = FileDescriptorProto(name="ml_metadata_of_a_run.proto", package=PACKAGE)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind) in fields.items():
            is_repeated, kind = kind.startswith(REPEATED), kind.removeprefix(REPEATED)
            label = Field.LABEL_REPEATED if is_repeated else Field.LABEL_OPTIONAL
            field = message.field.add(name=field_name, number=number, label=label)
            if kind in MESSAGES:
                field.type, field.type_name = Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
            else:
                field.type = getattr(Field, f"TYPE_{kind}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return dict(message_factory.GetMessageClassesForFiles([file.name], pool))
