"""Structured output as the `openai` package asks for it and parses it."""

import json
from enum import Enum
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.clients.talk import QUESTION

ASK: dict[str, Any] = {"model": "default", "messages": QUESTION, "temperature": 0, "max_tokens": 300}


class Size(Enum):
    SMALL = "small"
    LARGE = "large"


class Part(BaseModel):
    name: Annotated[str, Field(max_length=12)]
    count: Annotated[int, Field(ge=0, le=99)]


class Locker(BaseModel):
    """Nested, with an enum, a union, a list and a literal."""

    owner: Annotated[str, Field(max_length=12)]
    code: Annotated[str, Field(pattern=r"^[0-9]{4}$")]
    size: Size
    parts: Annotated[list[Part], Field(max_length=2)]
    remark: Annotated[str, Field(max_length=12)] | None
    open: bool
    version: Literal[1, 2]


# A list of one element or more, each within the one before.
LIST = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 9},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
    "additionalProperties": False,
}
# The token that begins "null": the model would never end the list by itself.
NULL = {"312": 100}


def schema(of: dict[str, Any], name: str = "answer") -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": of}}


def test_parse_gives_an_instance_of_the_pydantic_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(**ASK, response_format=Locker)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Locker)
    assert json.loads(choice.message.content or "") == choice.message.parsed.model_dump(mode="json")


def test_the_stream_helper_parses_at_the_end(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**ASK, response_format=Locker) as stream:
        done = [event for event in stream if event.type == "content.done"]
        final = stream.get_final_completion()
    assert len(done) == 1
    assert isinstance(done[0].parsed, Locker)
    assert final.choices[0].message.parsed == done[0].parsed


@pytest.mark.parametrize("seed", range(2))
def test_hot_sampling_keeps_to_the_schema(client: openai.OpenAI, seed: int) -> None:
    answer = client.chat.completions.parse(**{**ASK, "temperature": 1.5}, seed=seed, response_format=Locker)
    assert isinstance(answer.choices[0].message.parsed, Locker)


def test_an_answer_that_was_cut_is_the_sdks_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**{**ASK, "max_tokens": 3}, response_format=Locker)


def test_json_object_is_an_object(client: openai.OpenAI) -> None:
    asked = [{"role": "user", "content": 'Repeat after me: {"code": "5917"}'}]
    for messages in (asked, QUESTION):
        answer = client.chat.completions.create(
            **{**ASK, "messages": messages, "max_tokens": 40}, response_format={"type": "json_object"}
        )
        text = answer.choices[0].message.content or ""
        assert text.lstrip().startswith("{")
        # The model finds no end when nothing tells it how long an object is.
        if messages is asked:
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "minItems": 2, "maxItems": 4},
        {"enum": ["yes", "no", 7, None]},
        LIST,
        {
            "type": "object",
            "properties": {"day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"}},
            "required": ["day", "id"],
            "additionalProperties": False,
        },
    ],
    ids=["array", "enum", "recursive", "formats"],
)
def test_a_schema_of_ones_own_is_kept(client: openai.OpenAI, wanted: dict[str, Any]) -> None:
    bias = NULL if wanted is LIST else {}
    answer = client.chat.completions.create(**ASK, response_format=schema(wanted), logit_bias=bias)
    assert answer.choices[0].finish_reason == "stop"
    found = json.loads(answer.choices[0].message.content or "")
    jsonschema.validate(found, wanted, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "refused",
    [
        schema({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}),
        schema({"type": "no such type"}),
        {"type": "json_schema", "json_schema": {"name": "no spaces, please", "schema": {"type": "object"}}},
        {"type": "xml"},
    ],
    ids=["keyword", "type", "name", "format"],
)
def test_what_cannot_be_held_is_refused(client: openai.OpenAI, refused: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASK, response_format=refused)
    assert (caught.value.param or "").startswith("response_format")
