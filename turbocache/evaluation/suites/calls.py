"""The tool call that `arguments` asks for: its schema, a grammar that holds an answer to it, and how it is read."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask
from mlx_lm.tokenizer_utils import TokenizerWrapper

from turbocache.evaluation.suites.answers import Choose
from turbocache.mlxlm.model import wrapped_tokenizer

TOOL = "refund_order"
ARGUMENTS = ("order", "account", "receipt", "amount")
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes."""


def written(arguments: Mapping[str, Any]) -> str:
    """The call with these arguments, as a model should write it."""
    return json.dumps({"name": TOOL, "arguments": dict(arguments)})


def read_call(text: str) -> dict[str, Any] | None:
    """The first JSON object with a name in a text. None while there is no whole one."""
    decoder = json.JSONDecoder()
    for start in re.finditer("{", text):
        try:
            read = decoder.raw_decode(text, start.start())[0]
        except ValueError:
            continue
        if "name" in read:
            return dict(read)
    return None


def n_exact(text: str, arguments: Mapping[str, Any]) -> int:
    """How many arguments of the call in a text are exactly these. A call of another form has none."""
    call = read_call(text)
    given = None if call is None or call.get("name") != TOOL else call.get("arguments")
    return sum(given.get(name) == value for name, value in arguments.items()) if isinstance(given, dict) else 0


class CallGrammar:
    """Holds answers to the call's schema, with llguidance."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        eos = sorted(tokenizer.eos_token_ids)
        self._tokenizer = from_tokenizer(wrapped_tokenizer(tokenizer), eos_token=eos)
        types = {name: {"type": "integer" if name == "amount" else "string"} for name in ARGUMENTS}
        properties = {"name": {"const": TOOL}, "arguments": _object(types)}
        schema = json.dumps({**_object(properties), "x-guidance": _SPACING})
        self._matcher = LLMatcher(self._tokenizer, f"%llguidance {{}}\nstart: %json {schema}\n", log_level=0)
        if self._matcher.is_error():
            raise RuntimeError(f"llguidance refuses the call's schema: {self._matcher.get_error()}")

    def chooser(self) -> Choose:
        """Chooses the most likely token that the schema allows. For one answer."""
        matcher, consumed = self._matcher.deep_copy(), 0
        bits = allocate_token_bitmask(1, self._tokenizer.vocab_size)

        def choose(logits: np.ndarray, answer: Sequence[int]) -> int:
            nonlocal consumed
            matcher.consume_tokens(list(answer[consumed:]))
            consumed = len(answer)
            fill_next_token_bitmask(matcher, bits)
            allowed = logits.copy()
            apply_token_bitmask_inplace(allowed, bits)
            return int(allowed.argmax())

        return choose


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    names = list(properties)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
