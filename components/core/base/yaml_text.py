"""The one reader of YAML: plain values, and a key that a mapping has twice is an error."""

from typing import Any

import yaml

from components.core.base.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with two equal keys, of which YAML's own loader would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping whose keys differ."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line, scalar = key.start_mark.line + 1, (key.tag, key.value)
                if scalar in lines:
                    raise _DuplicateKey(key.value, lines[scalar], line)
                lines[scalar] = line
        return node


class _DuplicateKey(Exception):
    """A mapping has a key on two lines."""

    def __init__(self, key: str, first: int, second: int) -> None:
        super().__init__(f"the key {key!r} is on line {first} and again on line {second}")


def read_yaml(text: str, where: str) -> Any:
    """The values in a YAML or JSON text.

    Args:
        text: the whole text.
        where: names it in messages: a file, or an option.

    Raises:
        RecipeError: the text is no YAML, or a mapping in it has a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except _DuplicateKey as error:
        raise RecipeError(f"{where}: {error}", hint="remove one of them") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
