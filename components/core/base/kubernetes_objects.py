"""Parts of objects of Kubernetes as pydantic models: their keys are in camel case."""

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from components.core.base.config import Config


class Section(Config):
    """A part of a specification; an unknown key is refused."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class StatusPart(BaseModel):
    """A part of a status. Unknown keys of another version are ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, use_attribute_docstrings=True, validate_assignment=True
    )
