"""What validators say about several fields of a body together, as JSON Schema says it. A body's class lists them as
`conditions`, beside the validator that holds them.
"""

from typing import Any

Condition = dict[str, Any]


def given(*fields: str) -> Condition:
    """All of them are there and not null."""
    return {"required": list(fields), "properties": {field: {"not": {"type": "null"}} for field in fields}}


def not_both(one: str, other: str) -> Condition:
    return {"not": given(one, other)}


def is_true(field: str) -> Condition:
    return {"required": [field], "properties": {field: {"const": True}}}


def some(field: str) -> Condition:
    """A list that is not empty."""
    return {"required": [field], "properties": {field: {"type": "array", "minItems": 1}}}


def within(field: str, condition: Condition) -> Condition:
    """An object of which `condition` holds."""
    return {"required": [field], "properties": {field: {"type": "object", **condition}}}


def needs(when: Condition, then: Condition) -> Condition:
    """`when` holds only together with `then`."""
    return {"if": when, "then": then}
