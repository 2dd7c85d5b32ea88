"""What all sections of a spec share: they are frozen, and unknown keys are errors."""

from typing import Annotated

import pydantic
from pydantic import StringConstraints

NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class Section(pydantic.BaseModel):
    """A mapping in the YAML file. Types are strict, and a message never repeats a whole mapping."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)
