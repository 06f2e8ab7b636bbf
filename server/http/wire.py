"""Strict models of request bodies.

A body with an unknown field, a wrong type or an unsupported value is refused. A field that is not supported yet is in
its model with `only(...)`: the values that change nothing. The models' JSON schemas say the same.
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

UNSUPPORTED_PARAMETER = "unsupported_parameter"
UNSUPPORTED_VALUE = "unsupported_value"

MODEL_FACT = "x-of-model"
"""Marks JSON schemas that depend on the loaded model. `server.http.openapi` replaces it."""


@dataclass(frozen=True, slots=True)
class _Only:
    neutral: tuple[object, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        nullable = "type" not in handler(schema)  # a single type is no union with null
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
    """Accepts null and the given values, which change nothing. Refuses any other value as not supported."""
    return _Only(neutral)


def of_model(fact: Literal["name", "token", "answer"]) -> Any:
    """Marks a field whose valid values depend on the model: its names, its token ids, or its longest answer. They are
    checked after the rest of the body.
    """
    return Field(json_schema_extra={MODEL_FACT: fact})


def nonempty(text: str) -> str:
    if not text:
        raise PydanticCustomError("empty_string", "Expected a non-empty string")
    return text


Condition = dict[str, Any]


class Wire(BaseModel):
    """Strict input: no unknown fields, no coercion ("1" is not 1, true is not 1), no NaN or Infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    conditions: ClassVar[tuple[Condition, ...]] = ()
    """JSON Schema equivalents of the validators that compare several fields."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler(schema)
        if conditions := [one for kind in cls.__mro__[::-1] for one in vars(kind).get("conditions", ())]:
            handler.resolve_ref_schema(json_schema)["allOf"] = conditions
        return json_schema


REFUSED = WithJsonSchema(None)
"""Marks the model in a union that stands for unsupported objects. A field with `only` refuses them. The union's JSON
schema omits it.
"""
NonEmpty = Annotated[str, AfterValidator(nonempty), Field(json_schema_extra={"minLength": 1})]
ModelName = Annotated[str, of_model("name")]
TokenId = Annotated[int, Field(ge=0), of_model("token")]


def by_field(
    field: str, *known: str, missing: Callable[[dict[str, Any]], str | None] = lambda value: None
) -> Discriminator:
    """Discriminator of a union of models: the value of `field` in angle brackets, which tell tags from fields
    in pydantic's error locations. If there are `known` values, others are `<other>`, for a model that refuses them by
    name. `missing` gives the value where an object has none.
    """

    def tag(value: Any) -> str | None:
        kind = value.get(field) if isinstance(value, dict) else getattr(value, field, None)
        if kind is not None and known and kind not in known:
            return "<other>"
        if kind is None and isinstance(value, dict):
            kind = missing(value)
        return None if kind is None else f"<{kind}>"

    tag.__name__ = field  # pydantic's error has it
    return Discriminator(tag)


def by_kind(error: str, *kinds: tuple[type, str]) -> Discriminator:
    """Discriminator of a union of types: the tag of the first that matches. `server.http.error_handlers` words the
    error of this type.
    """
    return Discriminator(
        lambda value: next((tag for of, tag in kinds if isinstance(value, of)), None),
        custom_error_type=error,
        custom_error_message=error,
    )


# JSON Schema for the validators that compare several fields. A body's class lists them as `conditions`.


def given(*fields: str) -> Condition:
    """All fields are present and not null."""
    return {"required": list(fields), "properties": {field: {"not": {"type": "null"}} for field in fields}}


def is_true(field: str) -> Condition:
    return {"required": [field], "properties": {field: {"const": True}}}


def some(field: str) -> Condition:
    """The field is a list that is not empty."""
    return {"required": [field], "properties": {field: {"type": "array", "minItems": 1}}}


def within(field: str, condition: Condition) -> Condition:
    """The field is an object that satisfies `condition`."""
    return {"required": [field], "properties": {field: {"type": "object", **condition}}}


def needs(when: Condition, then: Condition) -> Condition:
    """If `when` holds, `then` must hold."""
    return {"if": when, "then": then}
