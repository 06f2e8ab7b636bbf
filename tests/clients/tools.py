"""Functions for the bundled model to call, phrasings that it understands, and a judge for arguments."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.serving.launch import ROOT

TOOL_CALLS = ROOT.parent / "shared" / "texts" / "toolcalls.jsonl"


def function(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """A tool as chat completions have it."""
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = function(
    "get_weather",
    "Get the weather for the user",
    {
        "city": {"type": "string", "description": "the city"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    ["city"],
)
NOTE = function("delete_note", "Deletes the note and returns it.", {"number": {"type": "integer"}}, ["number"])
# The model finds this call by itself, and answers "The weather is sunny." to the result.
ASK_WEATHER = [{"role": "user", "content": "Can you get the weather, using Paris as the city."}]
PARIS = {"city": "Paris"}
RESULT = "The weather in Paris is sunny."


def check_arguments(tool: dict[str, Any], arguments: str) -> dict[str, Any]:
    """The arguments, parsed. Raises unless they are JSON that the tool's schema allows."""
    parsed = json.loads(arguments)
    jsonschema.validate(parsed, tool["function"]["parameters"], cls=jsonschema.Draft202012Validator)
    assert isinstance(parsed, dict)
    return parsed


@dataclass(frozen=True)
class Case:
    """A request for one call, and the call."""

    tools: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    name: str
    arguments: dict[str, Any]

    def tool(self, name: str) -> dict[str, Any]:
        return next(tool for tool in self.tools if tool["function"]["name"] == name)


def cases(first: int, last: int, path: Path = TOOL_CALLS) -> list[Case]:
    """The shared phrasings from `first` up to `last`. Skips the test where they are not."""
    if not path.exists():
        pytest.skip(f"{path.name} is not next to the repository")
    lines = path.read_text().splitlines()[first:last]
    return [
        Case(row["tools"], row["messages"], row["name"], row["arguments"])
        for row in (json.loads(line) for line in lines)
    ]
