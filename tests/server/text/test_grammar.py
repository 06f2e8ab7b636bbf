"""server.text.grammar: what may follow what, and what is refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from server.errors import InvalidRequest, UnsupportedField
from server.protocol import AnswerRules, Tool
from server.text.assembler import Vocabulary
from server.text.grammar import GrammarCompiler, Guide
from server.text.tool_formats import ToolFormat, tool_format
from tests.server.text.test_tool_formats import NUMBERED, PARAMETERS, with_template
from turbocache.mlxlm.model import LoadedModel

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "y": {"enum": ["a", "b"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
TOOLS = (Tool("move", POINT), Tool("stay"))
MOVE = '<tool_call>{"name": "move", "arguments": {"x": 1, "y": "a"}}</tool_call>'
STAY = '<tool_call>{"name": "stay", "arguments": {"any": [1]}}</tool_call>'
JSON = '{"x": 1, "y": "a"}'


@pytest.fixture(scope="module")
def compiler(bundled: LoadedModel) -> GrammarCompiler:
    vocabulary = Vocabulary(bundled.tokenizer)
    return GrammarCompiler(bundled.tokenizer, tool_format(bundled.tokenizer), vocabulary)


class Row:
    """Takes given tokens through a guide, as a row of the batch would."""

    def __init__(self, compiler: GrammarCompiler, rules: AnswerRules, in_thought: bool = False) -> None:
        compiled = compiler.compile(rules, in_thought)
        assert compiled is not None
        self.n_logits = compiled.tokenizer.vocab_size + 5  # models may have more logits than their tokenizer has tokens
        self._token: int | None = None
        self._guide: Guide = compiled.guide(lambda: self._token)

    def allowed(self) -> np.ndarray:
        """Which tokens may come next."""
        logits = self._guide(mx.zeros(1, dtype=mx.int32), mx.zeros((1, self.n_logits)))
        assert self._guide.error is None
        return np.array(logits)[0] == 0

    def takes(self, tokens: Sequence[int]) -> bool:
        """Whether the tokens may come one after the other."""
        for token in tokens:
            if not self.allowed()[token]:
                return False
            self._token = token
        return True


def accepts(
    bundled: LoadedModel, compiler: GrammarCompiler, rules: AnswerRules, text: str, in_thought: bool = False
) -> bool:
    """Whether an answer may be just this text."""
    tokens = bundled.tokenizer.encode(text, add_special_tokens=False)
    return Row(compiler, rules, in_thought).takes([*tokens, *bundled.tokenizer.eos_token_ids])


REQUIRED = AnswerRules(TOOLS, "required")
STRICT = AnswerRules((replace(TOOLS[0], strict=True), TOOLS[1]))
NONE = AnswerRules(TOOLS, "none")
SCHEMA = AnswerRules(schema=POINT)
BOTH = AnswerRules(TOOLS, schema=POINT)


@pytest.mark.parametrize(
    ("rules", "text", "may"),
    [
        (SCHEMA, JSON, True),
        (SCHEMA, '{"x": 1}', False),
        (SCHEMA, "Sure: " + JSON, False),
        (SCHEMA, JSON + " ", False),
        (REQUIRED, MOVE, True),
        (REQUIRED, STAY, True),
        (REQUIRED, f"{MOVE}\n{STAY}", True),
        (replace(REQUIRED, parallel=False), f"{MOVE}\n{STAY}", False),
        (replace(REQUIRED, allowed_tools=frozenset({"stay"})), STAY, True),
        (replace(REQUIRED, allowed_tools=frozenset({"stay"})), MOVE, False),
        (REQUIRED, "Hello", False),
        (REQUIRED, "", False),
        (REQUIRED, MOVE.replace("1", '"one"'), False),
        (REQUIRED, MOVE.replace("move", "run"), False),
        (STRICT, "Hello", True),
        (STRICT, "", True),
        (STRICT, f"Well. {MOVE} So {STAY}!", True),
        (STRICT, f"Well. {MOVE.replace('1', 'null')}", False),
        (STRICT, "Well. <tool_call>", False),
        (replace(STRICT, parallel=False), f"Well. {MOVE}", True),
        (replace(STRICT, parallel=False), f"{MOVE} and", False),
        (NONE, "Hello <tool", True),
        (NONE, f"Hello {MOVE}", False),
        (BOTH, JSON, True),
        (BOTH, MOVE, True),
        (BOTH, "Hello", False),
    ],
)
def test_what_an_answer_may_be(
    bundled: LoadedModel, compiler: GrammarCompiler, rules: AnswerRules, text: str, may: bool
) -> None:
    assert accepts(bundled, compiler, rules, text) is may


def test_calls_can_not_be_spelled_where_they_are_not_allowed(bundled: LoadedModel, compiler: GrammarCompiler) -> None:
    """The mark is a token of its own, but its letters are tokens too, and the text is what clients read calls from."""
    spelled = [bundled.tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in "<tool_call>"]
    assert bundled.tokenizer.decode(spelled).strip() == "<tool_call>"
    assert not Row(compiler, NONE).takes(spelled)
    assert not Row(compiler, STRICT).takes(spelled)


@pytest.mark.parametrize("rules", [AnswerRules(), AnswerRules(TOOLS), replace(AnswerRules(TOOLS), parallel=False)])
def test_what_needs_no_grammar(compiler: GrammarCompiler, rules: AnswerRules) -> None:
    assert compiler.compile(rules, in_thought=False) is None


def test_a_thought_that_the_prompt_has_opened_comes_first(bundled: LoadedModel, compiler: GrammarCompiler) -> None:
    assert accepts(bundled, compiler, SCHEMA, f"Let me see.</think>\n\n{JSON}", in_thought=True)
    assert not accepts(bundled, compiler, SCHEMA, JSON, in_thought=True)
    assert not accepts(bundled, compiler, SCHEMA, f"<think>Let me see.</think>{JSON}")


def test_a_thought_may_come_first_where_the_template_speaks_of_thoughts(bundled: LoadedModel) -> None:
    thinking = with_template(bundled, "{{ messages[0].content }}<think>")
    vocabulary = Vocabulary(thinking)
    compiler = GrammarCompiler(thinking, None, vocabulary)
    assert accepts(bundled, compiler, SCHEMA, f"<think>Let me see.</think>\n{JSON}")
    assert accepts(bundled, compiler, SCHEMA, JSON)
    assert not accepts(bundled, compiler, SCHEMA, f"Let me see. {JSON}")


def test_schemas_that_can_not_be_held_to_are_refused_where_they_stand(compiler: GrammarCompiler) -> None:
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(InvalidRequest, match="uniqueItems") as refused:
        compiler.compile(AnswerRules(schema=unique, param="response_format.json_schema.schema"), in_thought=False)
    assert refused.value.param == "response_format.json_schema.schema"
    strict = Tool("f", unique, strict=True, param="tools[1].function.parameters")
    with pytest.raises(InvalidRequest, match="uniqueItems") as refused:
        compiler.compile(AnswerRules((TOOLS[0], strict)), in_thought=False)
    assert refused.value.param == "tools[1].function.parameters"


def test_a_tool_that_is_not_strict_is_held_to_what_can_be_held(bundled: LoadedModel, compiler: GrammarCompiler) -> None:
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}
    rules = AnswerRules((Tool("f", unique),), "required")
    call = '<tool_call>{"name": "f", "arguments": %s}</tool_call>'
    assert accepts(bundled, compiler, rules, call % '{"a": [1, 1]}')
    assert not accepts(bundled, compiler, rules, call % "{}")
    broken = AnswerRules((Tool("f", {"type": "strin"}),), "required")
    assert accepts(bundled, compiler, broken, call % '{"whatever": 1}')
    assert not accepts(bundled, compiler, broken, call % "[]")


def test_options_of_the_grammar_library_are_not_taken_from_requests(
    bundled: LoadedModel, compiler: GrammarCompiler
) -> None:
    sly: dict[str, Any] = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with pytest.raises(InvalidRequest):
        compiler.compile(AnswerRules(schema={**sly, "x-guidance": {"lenient": True}}), in_thought=False)


def test_models_without_tools_or_with_calls_that_have_names(bundled: LoadedModel) -> None:
    vocabulary = Vocabulary(bundled.tokenizer)
    with pytest.raises(UnsupportedField, match="knows no tools"):
        GrammarCompiler(bundled.tokenizer, None, vocabulary).compile(AnswerRules(TOOLS), in_thought=False)
    format = tool_format(with_template(bundled, NUMBERED))
    assert isinstance(format, ToolFormat)
    compiler = GrammarCompiler(bundled.tokenizer, format, vocabulary)
    assert compiler.compile(AnswerRules(TOOLS), in_thought=False) is None
    with pytest.raises(UnsupportedField, match="json_tools"):
        compiler.compile(REQUIRED, in_thought=False)


@pytest.mark.parametrize(
    ("arguments", "may"),
    [
        ({"text": "Hi!\n</b> 3 < 4", "n": 3, "kind": "b"}, True),
        ({"text": "", "n": 3, "kind": "b", "more": {"x": [1]}}, True),
        ({"n": 3, "kind": "b"}, False),
        ({"text": "", "n": "three", "kind": "b"}, False),
        ({"text": "", "n": 3, "kind": "c"}, False),
        ({"text": "a\n</parameter>b", "n": 3, "kind": "b"}, False),
        ({"text": "</tool_call>", "n": 3, "kind": "b"}, False),
    ],
)
def test_calls_whose_arguments_stand_each_by_itself(bundled: LoadedModel, arguments: dict[str, Any], may: bool) -> None:
    """As Qwen3-Coder and others write them; what is accepted reads back as it was."""
    tokenizer = with_template(bundled, PARAMETERS)
    format, vocabulary = tool_format(tokenizer), Vocabulary(tokenizer)
    assert format is not None
    types: dict[str, Any] = {"text": {"type": "string"}, "n": {"type": "integer"}, "kind": {"enum": ["a", "b"]}}
    schema = {"type": "object", "properties": {**types, "more": {"type": "object"}}, "required": list(types)}
    tool = Tool("f", schema, strict=True)
    parameters = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    call = f"<tool_call>\n<function=f>\n{parameters}</function>\n</tool_call>"
    compiler = GrammarCompiler(tokenizer, format, vocabulary)
    assert accepts(bundled, compiler, AnswerRules((tool,), "required"), call) is may
    if may:
        read = format.read(call.removeprefix(format.start).removesuffix(format.end), [tool.template])
        assert read is not None
        assert json.loads(read[0].arguments) == arguments


def test_strict_strings_with_bounds_are_refused_where_arguments_are_no_json(bundled: LoadedModel) -> None:
    tokenizer = with_template(bundled, PARAMETERS)
    vocabulary = Vocabulary(tokenizer)
    compiler = GrammarCompiler(tokenizer, tool_format(tokenizer), vocabulary)
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}}
    with pytest.raises(UnsupportedField, match="each by itself"):
        compiler.compile(AnswerRules((Tool("f", schema, strict=True),)), in_thought=False)
    assert compiler.compile(AnswerRules((Tool("f", schema),), "required"), in_thought=False) is not None


def test_the_same_rules_are_compiled_once(compiler: GrammarCompiler) -> None:
    first = compiler.compile(AnswerRules(schema=json.loads(json.dumps(POINT))), in_thought=False)
    assert first is compiler.compile(AnswerRules(schema=POINT), in_thought=False)


def test_a_grammar_that_gives_up_says_so_and_lets_go(compiler: GrammarCompiler) -> None:
    row = Row(compiler, SCHEMA)
    row._token = 10
    row._guide(mx.zeros(1, dtype=mx.int32), mx.zeros((1, row.n_logits)))
    assert row._guide.error
    logits = row._guide(mx.zeros(1, dtype=mx.int32), mx.zeros((1, row.n_logits)))
    assert not np.isinf(np.array(logits)).any()
