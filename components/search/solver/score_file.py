"""Scores and costs from other programs: the table of layers that `tessera search solve` reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.core.base.errors import InputError
from components.search.solver.problem import Choice, Problem, exact

MAX_FAULTS_SHOWN = 3

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Record(BaseModel):
    """A record that ignores unknown keys: tables come from other programs."""

    model_config = ConfigDict(frozen=True)


class LayerOption(_Record):
    """One way to build a layer."""

    name: str = ""
    score: Number
    costs: dict[str, Number] = Field(default_factory=dict)


class Layer(_Record):
    """A layer and its options."""

    options: tuple[LayerOption, ...] = Field(min_length=1)


class LayerTable(_Record):
    """Layers; scores are to be minimised, costs add up over the layers."""

    layers: tuple[Layer, ...] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a table.

        Raises:
            InputError: no such file, no JSON, or not such a table; says what is wrong, and where.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            faults = error.errors(include_url=False)
            lines = [
                ": ".join(filter(None, [".".join(map(str, fault["loc"])), fault["msg"]]))
                for fault in faults[:MAX_FAULTS_SHOWN]
            ]
            more = f"; and {len(faults) - MAX_FAULTS_SHOWN} more" if len(faults) > MAX_FAULTS_SHOWN else ""
            raise InputError(f"{path.name} is no table of layers: {'; '.join(lines)}{more}", hint=FORM) from None

    @property
    def scores(self) -> list[list[float]]:
        """Of each option of each layer."""
        return [[option.score for option in layer.options] for layer in self.layers]

    def names(self) -> list[str]:
        """Costs that every option has, in the order of the first one."""
        options = [option.costs.keys() for layer in self.layers for option in layer.options]
        shared = set(options[0]).intersection(*options)
        return [name for name in options[0] if name in shared]

    def costs(self, name: str) -> list[list[float]]:
        """One cost of each option of each layer.

        Raises:
            InputError: an option does not have it.
        """
        for number, layer in enumerate(self.layers):
            for index, option in enumerate(layer.options):
                if name not in option.costs:
                    known = ", ".join(self.names()) or "none"
                    raise InputError(
                        f"a limit names the cost {name!r}, but option {index} ({option.name!r}) of layer {number} "
                        "does not have it",
                        hint=f"costs that all options have: {known}",
                    )
        return [[option.costs[name] for option in layer.options] for layer in self.layers]

    def problem(self, limits: Mapping[str, float]) -> Problem:
        """The problem to solve under these limits.

        Raises:
            InputError: a limit on a cost that an option does not have.
        """
        return Problem.of(self.scores, {name: self.costs(name) for name in limits}, limits)

    def totals(self, choice: Choice) -> dict[str, float]:
        """Total costs of a choice by name; whole numbers stay integers."""
        totals: dict[str, float] = {}
        for name in self.names():
            chosen = (layer.options[option].costs[name] for layer, option in zip(self.layers, choice, strict=True))
            total = sum(map(exact, chosen))
            totals[name] = int(total) if total == int(total) else float(total)
        return totals


FORM = json.dumps({"layers": [{"options": [{"name": "full", "score": 0.0, "costs": {"parameters": 1000}}]}]})
"""A table of one option, for messages."""
