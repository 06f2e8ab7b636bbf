"""How every body is parsed: strictly, and nothing in it is ignored.

An unknown field, a wrong type or a value that this version does not honour is refused. A field whose honouring comes
later stands in its model with `only(...)`, the values that change nothing.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator
from pydantic_core import PydanticCustomError

UNSUPPORTED_PARAMETER = "unsupported_parameter"
UNSUPPORTED_VALUE = "unsupported_value"


def only(*neutral: object) -> AfterValidator:
    """Accepts null and the given values, which change nothing; any other value is refused as not supported yet."""

    useful = [value for value in neutral if value not in ([], {})]

    def check(value: Any) -> Any:
        if value is None or any(value == other and type(value) is type(other) for other in neutral):
            return value
        if not useful:
            raise PydanticCustomError(UNSUPPORTED_PARAMETER, "is not supported by this version")
        supported = " or ".join(json.dumps(other) for other in useful)
        raise PydanticCustomError(
            UNSUPPORTED_VALUE, "is supported by this version only as {supported}", {"supported": supported}
        )

    return AfterValidator(check)


def nonempty(text: str) -> str:
    if not text:
        raise PydanticCustomError("empty_string", "Expected a non-empty string")
    return text


class Wire(BaseModel):
    """Strict input: no unknown fields, no coercion ("1" is not 1, true is not 1), no NaN or Infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


NonEmpty = Annotated[str, AfterValidator(nonempty)]


def by_field(field: str) -> Discriminator:
    """For a union of models: the tag is the value of a field, in angle brackets. Tags show up in pydantic's error
    locations, and so they are told from fields there.
    """

    def tag(value: Any) -> str | None:
        found = value.get(field) if isinstance(value, dict) else getattr(value, field, None)
        return None if found is None else f"<{found}>"

    tag.__name__ = field  # which pydantic's error names
    return Discriminator(tag)


def kind_of(*kinds: tuple[type, str]) -> Callable[[Any], str | None]:
    """For a union's discriminator: the tag of the first type that a value has."""
    return lambda value: next((tag for of, tag in kinds if isinstance(value, of)), None)
