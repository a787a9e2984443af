"""The page of the chart, made from the comments in `values.yaml`: `python -m infra.chart_page`.

A comment that begins with `# --` describes the key below it, with everything that the key contains.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jinja2
import yaml

from infra.chart import CHART

PAGE = CHART / "README.md"
TEMPLATE = CHART / "README.md.jinja"


@dataclass(frozen=True)
class Value:
    """A row of the page."""

    key: str
    default: str
    description: str


def documented_values(text: str) -> list[Value]:
    """The values of a `values.yaml` in their order.

    Raises:
        ValueError: a value has no description.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return list(_walk(root, yaml.safe_load(text), (), text.splitlines()))


def page() -> str:
    """The page as it should be."""
    sections: dict[str, list[Value]] = {}
    for value in documented_values((CHART / "values.yaml").read_text(encoding="utf-8")):
        sections.setdefault(value.key.partition(".")[0], []).append(value)
    environment = jinja2.Environment(keep_trailing_newline=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(chart=yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8")), sections=sections)


def _walk(node: yaml.Node | None, defaults: object, path: tuple[str, ...], lines: Sequence[str]) -> Iterator[Value]:
    """Rows of the keys below a node."""
    if not (isinstance(node, yaml.MappingNode) and isinstance(defaults, dict) and defaults):
        raise ValueError(f"{'.'.join(path)} has no description in values.yaml: add a comment that begins with `# --`")
    for key, below in node.value:
        keys, default = (*path, key.value), defaults[key.value]
        if description := _comment_above(key.start_mark.line, lines):
            yield Value(".".join(keys), json.dumps(default), description)
        else:
            yield from _walk(below, default, keys, lines)


def _comment_above(line: int, lines: Sequence[str]) -> str:
    """The description that ends right above a line; empty where there is none."""
    first = line
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    text = " ".join(one.strip().removeprefix("#").strip() for one in lines[first:line])
    return text.removeprefix("--").strip() if text.startswith("--") else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
