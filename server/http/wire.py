"""How every body is parsed: strictly, and nothing in it is ignored.

An unknown field, a wrong type or a value that this version does not honour is refused. A field whose honouring comes
later stands in its model with `only(...)`, the values that change nothing. JSON schemas of the models say the same.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from server.http.conditions import Condition

UNSUPPORTED_PARAMETER = "unsupported_parameter"
UNSUPPORTED_VALUE = "unsupported_value"

MODEL_FACT = "x-of-model"
"""In JSON schemas where what is valid depends on the loaded model, until the document is made."""


@dataclass(frozen=True, slots=True)
class _Only:
    neutral: tuple[object, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        nullable = "type" not in handler(schema)  # what has one type is no union with null
        return {"enum": [*self.neutral, None] if nullable else [*self.neutral]}

    def _check(self, value: Any) -> Any:
        if value is None or any(value == other and type(value) is type(other) for other in self.neutral):
            return value
        useful = [value for value in self.neutral if value not in ([], {})]
        if not useful:
            raise PydanticCustomError(UNSUPPORTED_PARAMETER, "is not supported by this version")
        supported = " or ".join(json.dumps(other) for other in useful)
        raise PydanticCustomError(
            UNSUPPORTED_VALUE, "is supported by this version only as {supported}", {"supported": supported}
        )


def only(*neutral: object) -> _Only:
    """Accepts null and the given values, which change nothing; any other value is refused as not supported yet."""
    return _Only(neutral)


@dataclass(frozen=True, slots=True)
class _OfModel:
    fact: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), MODEL_FACT: self.fact}


def of_model(fact: Literal["name", "token", "answer"]) -> _OfModel:
    """Valid are only the loaded model's names, its tokens, or numbers of tokens that it may answer with. This is
    checked later than the rest of the body.
    """
    return _OfModel(fact)


def nonempty(text: str) -> str:
    if not text:
        raise PydanticCustomError("empty_string", "Expected a non-empty string")
    return text


class Wire(BaseModel):
    """Strict input: no unknown fields, no coercion ("1" is not 1, true is not 1), no NaN or Infinity. `conditions` are
    for the JSON schema what a class's validators of several fields are for bodies.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    conditions: ClassVar[tuple[Condition, ...]] = ()

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler(schema)
        if conditions := [one for kind in cls.__mro__[::-1] for one in vars(kind).get("conditions", ())]:
            handler.resolve_ref_schema(found)["allOf"] = conditions
        return found


REFUSED = WithJsonSchema(None)
"""On one of a union's models: objects that this version can't read, refused by a field with `only`. JSON schemas of the
union leave it out.
"""
NonEmpty = Annotated[str, AfterValidator(nonempty), Field(json_schema_extra={"minLength": 1})]
ModelName = Annotated[str, of_model("name")]
TokenId = Annotated[int, Field(ge=0), of_model("token")]


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
