"""Random JSON schemas: nested, with enums, arrays, unions, formats, patterns, bounds and recursive references."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(red|green|blue)$", "^[a-f0-9]{6}$", r"^\d+(\.\d{1,2})?$")
_NAMES = ("id", "name", "größe", "a b", "kind", "items", "next", "x-y", "$ref", "type", "価格", 'q"uote')
_CONSTANTS: tuple[Any, ...] = ("red", "sea green", "", "ä\n", 7, -1, 0.5, True, False, None)
UNSUPPORTED: tuple[Schema, ...] = (
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"type": "array", "contains": {"type": "integer"}},
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"minLength": 3}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "unevaluatedProperties": False},
    {"type": "string", "format": "nonsense"},
    {"type": "string", "pattern": "^(?=a)b"},
    {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]},
    {"$ref": "https://example.com/schema"},
    {"type": "strin"},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"enum": []},
)
"""Schemas that say more than can be held to, or what nothing can satisfy."""


class SchemaMaker:
    """Draws schemas. Strings and lists are mostly short, so that a hot model comes to an end."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)

    def schema(self) -> Schema:
        """A whole schema, whose value is an object."""
        recursive = self._dice.random() < 0.3
        schema = self._object(3, recursive)
        if recursive:
            schema["$defs"] = {"node": self._node()}
            schema["properties"]["tree"] = {"$ref": "#/$defs/node"}
        return schema

    def _any(self, depth: int, recursive: bool = False) -> Schema:
        plain: list[Callable[[], Schema]] = [
            self._string,
            self._number,
            self._enum,
            self._const,
            lambda: {"type": "boolean"},
        ]
        if depth <= 0:
            return self._dice.choice(plain)()
        if recursive and self._dice.random() < 0.15:
            return {"$ref": "#/$defs/node"}
        nested: list[Callable[[], Schema]] = [
            lambda: self._object(depth - 1, recursive),
            lambda: self._array(depth - 1, recursive),
            lambda: self._union(depth - 1, recursive),
            lambda: self._all_of(),
        ]
        return self._dice.choice([*plain, *nested])()

    def _object(self, depth: int, recursive: bool) -> Schema:
        names = self._dice.sample(_NAMES, self._dice.randint(1, 4))
        schema: Schema = {
            "type": "object",
            "properties": {name: self._any(depth, recursive) for name in names},
            "additionalProperties": False,
        }
        if self._dice.random() < 0.8:
            schema["required"] = self._dice.sample(names, self._dice.randint(1, len(names)))
        if self._dice.random() < 0.2:
            schema["description"] = "What it is."
        return schema

    def _node(self) -> Schema:
        """A list's or a tree's node."""
        value = self._any(0)
        end = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        kids = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}
        name, link = self._dice.choice([("next", end), ("kids", kids)])
        return {
            "type": "object",
            "properties": {"value": value, name: link},
            "required": ["value", name],
            "additionalProperties": False,
        }

    def _array(self, depth: int, recursive: bool) -> Schema:
        least = self._dice.randint(0, 2)
        if self._dice.random() < 0.2:
            items = [self._any(0), self._any(depth, recursive)]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": 2}
        return {
            "type": "array",
            "items": self._any(depth, recursive),
            "minItems": least,
            "maxItems": least + self._dice.randint(0, 2),
        }

    def _union(self, depth: int, recursive: bool) -> Schema:
        if self._dice.random() < 0.3:
            return {"type": self._dice.sample(["string", "integer", "null", "boolean"], 2), "maxLength": 8}
        return {"anyOf": [self._any(depth, recursive) for _ in range(self._dice.randint(2, 3))]}

    def _all_of(self) -> Schema:
        return {"allOf": [{"type": "integer", "minimum": -5}, {"maximum": self._dice.randint(0, 2000)}]}

    def _string(self) -> Schema:
        kind = self._dice.random()
        if kind < 0.3:
            return {"type": "string", "format": self._dice.choice(FORMATS)}
        if kind < 0.5:
            return {"type": "string", "pattern": self._dice.choice(PATTERNS)}
        if kind < 0.6:
            return {"type": "string"}
        least = self._dice.randint(0, 4)
        return {"type": "string", "minLength": least, "maxLength": least + self._dice.randint(0, 12)}

    def _number(self) -> Schema:
        kind, low = self._dice.choice(["integer", "number"]), self._dice.randint(-1000, 1000)
        schema: Schema = {"type": kind}
        if self._dice.random() < 0.5:
            schema |= {"minimum": low, "exclusiveMaximum": low + self._dice.randint(1, 500)}
        elif kind == "integer" and self._dice.random() < 0.3:
            schema["multipleOf"] = self._dice.randint(2, 9)
        return schema

    def _enum(self) -> Schema:
        return {"enum": self._dice.sample(_CONSTANTS, self._dice.randint(1, 4))}

    def _const(self) -> Schema:
        return {"const": self._dice.choice([*_CONSTANTS, {"a": [1, "b"]}, [None, 2]])}
