"""The file that names the served model: one value in it is read and replaced; comments and all else stay."""

import json
from collections.abc import Sequence
from typing import Any

import yaml

from components.core.base.errors import InputError

NULL = "tag:yaml.org,2002:null"


def read_value(text: str, key: str, where: str) -> str:
    """The text under a dotted key; empty where there is none yet.

    Args:
        text: the file, YAML of one or several documents, or JSON.
        key: the key; a number is a place in a list.
        where: names the file in messages.

    Raises:
        InputError: the file is no YAML, or does not have the key exactly once.
    """
    _, node = _find(text, key, where)
    return "" if node.tag == NULL else str(node.value)


def replace_value(text: str, key: str, value: str, where: str) -> str:
    """The file with another text under a dotted key. The result is parsed to see that nothing else has changed.

    Args:
        text: the file.
        key: the key.
        value: the new text.
        where: names the file in messages.

    Raises:
        InputError: the file is no YAML, does not have the key exactly once, or uses its value elsewhere.
    """
    number, node = _find(text, key, where)
    start, end = node.start_mark.index, node.end_mark.index
    is_quoted = node.style in ("'", '"') or where.endswith(".json") or yaml.safe_load(value) != value
    written = json.dumps(value) if is_quoted else value
    if start == end:  # a key without a value ends with its colon
        written = f" {written}"
    changed = text[:start] + written + text[end:]
    expected = _documents(text, where)
    *owners, last = key.split(".")
    owner = expected[number]
    for part in owners:
        owner = owner[_index(owner, part)]
    owner[_index(owner, last)] = value
    try:
        is_only_change = node.style not in ("|", ">") and _documents(changed, where) == expected
    except InputError:  # an anchor has gone with the old value
        is_only_change = False
    if not is_only_change:
        raise InputError(
            f"{where}: the value of {key} cannot be replaced without changing another",
            hint="write it as a plain text of its own, without an anchor",
        )
    return changed


def _find(text: str, key: str, where: str) -> tuple[int, yaml.ScalarNode]:
    """Number of the document and node of a key."""
    try:
        roots = list(yaml.compose_all(text, yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise _not_yaml(where, error) from None
    found = [(number, node) for number, root in enumerate(roots) for node in _descend(root, key.split("."))]
    if len(found) == 1 and isinstance(node := found[0][1], yaml.ScalarNode):
        return found[0][0], node
    problem = "has no key" if not found else "has more than once the key" if len(found) > 1 else "has values below"
    hint = f'write it once, with an empty text: {key.rpartition(".")[2]}: ""'
    raise InputError(f"{where} {problem} {key}", hint=hint if found else f"{hint}{_others(roots, key.split('.'))}")


def _others(roots: Sequence[yaml.Node], parts: Sequence[str]) -> str:
    """The keys that are there in place of one that is not; empty where there are none."""
    for end in range(len(parts) - 1, 0, -1):
        nodes = [node for root in roots for node in _descend(root, list(parts[:end]))]
        names = [name.value for node in nodes if isinstance(node, yaml.MappingNode) for name, _ in node.value]
        if names:
            return f"; below {'.'.join(parts[:end])} there is {', '.join(names)}"
    return ""


def _descend(node: yaml.Node | None, parts: list[str]) -> list[yaml.Node]:
    """Nodes below a path of keys; more than one where a mapping has a key twice."""
    if node is None or not parts:
        return [] if node is None else [node]
    first, rest = parts[0], parts[1:]
    if isinstance(node, yaml.MappingNode):
        below = [value for name, value in node.value if name.value == first]
    elif isinstance(node, yaml.SequenceNode) and first.isdigit() and int(first) < len(node.value):
        below = [node.value[int(first)]]
    else:
        below = []
    return [found for each in below for found in _descend(each, rest)]


def _documents(text: str, where: str) -> list[Any]:
    try:
        return list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise _not_yaml(where, error) from None


def _index(owner: Any, part: str) -> Any:
    """A part of a key as it addresses a list or a mapping, whose keys need not be texts."""
    if isinstance(owner, list):
        return int(part)
    return next((name for name in owner if str(name) == part), part)


def _not_yaml(where: str, error: yaml.YAMLError) -> InputError:
    return InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}")
