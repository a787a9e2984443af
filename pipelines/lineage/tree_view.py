"""Lineage as a drawing for the terminal."""

from typing import Any

from rich.console import Group, RenderableType
from rich.tree import Tree


def as_tree(found: dict[str, Any]) -> Tree:
    """An artifact: what it was made from below it, its data files, its recipes, then what was made from it."""
    tree = Tree(_describe(found))
    shown: set[str] = set()
    for name, ancestor in found["inputs"].items():
        _grow(tree, name, ancestor, shown)
    if found["data"]:
        branch = tree.add("data files, with sha256")
        for data in found["data"]:
            part = branch.add(_describe(data))
            for name, entry in data["files"].items():
                part.add(f"{entry['sha256']}  {name}")
    if found["recipes"]:
        branch = tree.add("recipes")
        for recipe in found["recipes"]:
            branch.add(f"{recipe['name']} {recipe['digest'][:12]}  {', '.join(recipe['runs'])}")
    if found["descendants"]:
        branch = tree.add("made from it")
        for descendant in found["descendants"]:
            branch.add(_describe(descendant))
    return tree


def as_list(found: dict[str, Any]) -> RenderableType:
    """A file: where it is, and which models have seen it."""
    holders = Tree(f"{found['sha256']} is in")
    for holder in found["artifacts"]:
        holders.add(f"{_describe(holder)}: {', '.join(holder['files'])}")
    models = Tree(f"seen by {len(found['seen_by'])} models")
    for model in found["seen_by"]:
        models.add(_describe(model))
    return Group(holders, models)


def _grow(tree: Tree, name: str, found: dict[str, Any], shown: set[str]) -> None:
    """Add an ancestor with all that it was made from; one that stands further up already is only named."""
    if found["digest"] in shown and found["inputs"]:
        tree.add(f"{name}: {found['digest'][:12]}, see above")
        return
    shown.add(found["digest"])
    branch = tree.add(f"{name}: {_describe(found)}")
    for inner, ancestor in found["inputs"].items():
        _grow(branch, inner, ancestor, shown)


def _describe(found: dict[str, Any]) -> str:
    commit = f", commit {found['git_commit'][:8]}" if found["git_commit"] else ""
    made = f"by {found['stage']} (code {found['code'][:8]}{commit})" if found["stage"] else "given"
    return f"{found['digest'][:12]} {found['kind'] or 'damaged'} {made}  {', '.join(found['roles'])}".rstrip()
