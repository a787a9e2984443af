"""The base class of every configuration: frozen; an unknown key is refused with the most similar known one."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from components.core.base.errors import RecipeError
from components.core.base.suggestions import nearest


class Config(BaseModel):
    """A frozen record whose fields are documented with their unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    renamed_keys: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions, and what each is called now: named in the error about the old one."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str = "") -> Self:
        """Check `values`; the error lists everything that is wrong with them.

        Args:
            values: plain JSON-like values.
            where: dotted path of these values in the user's file, for the message.

        Raises:
            RecipeError: unknown key (the hint names the most similar one), wrong type, or value out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            message, hint = _explain(cls, error, where)
            raise RecipeError(message, hint=hint) from None

    def canonical(self) -> dict[str, JsonValue]:
        """Plain values with sorted keys: equal configurations have equal canonical forms."""
        plain: dict[str, JsonValue] = json.loads(canonical_json(self.model_dump(mode="json")))
        return plain


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: object) -> str:
    """SHA-256 of the canonical JSON of `value`, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> tuple[str, str | None]:
    """One line for each fault, and a hint for each unknown key."""
    lines: list[str] = []
    hints: list[str] = []
    for fault in error.errors(include_url=False):
        path = ".".join([where, *map(str, fault["loc"])] if where else map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown key {path!r}")
            owner, key = _model_at(model, fault["loc"][:-1]), str(fault["loc"][-1])
            renamed = getattr(owner, "renamed_keys", {}).get(key)
            if renamed is not None:
                hints.append(f"{key} is called {renamed} now")
            else:
                hints.append(nearest(key, list(owner.model_fields)) or "it takes no keys")
        elif fault["type"] == "missing":
            lines.append(f"missing key {path!r}")
        else:
            plain = isinstance(fault["input"], str | int | float | bool | None)
            value = f"{path or 'value'}={fault['input']!r}" if plain else path
            lines.append(": ".join(filter(None, [value, fault["msg"].removeprefix("Value error, ")])))
    return "; ".join(lines), "; ".join(hints) or None


def _model_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The configuration class at `path` below `model`."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # an index into a list, or the tag of a union: stay with the model found so far
        nested = [found for found in _models_in(field.annotation)]
        if nested:
            model = nested[0]
    return model


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """The configuration classes named in a type annotation, outermost first."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]
