"""server.text.tool_formats: which of mlx-lm's parsers fits a model, by what its chat template writes."""

import copy
import json

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools, mistral

from server.text.tool_formats import Call, CallShape, ParameterShape, ToolFormat, template_knows_tools, tool_format
from turbocache.mlxlm.model import LoadedModel

_TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
_END = "{% endfor %}"
HERMES = (
    _TURNS
    + "{% for c in m.tool_calls or [] %}<tool_call>\n"
    + '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    + "\n</tool_call>{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    + _END
)
PARAMETERS = (
    _TURNS
    + "{% for c in m.tool_calls or [] %}<tool_call>\n<function={{ c.function.name }}>\n"
    + "{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}"
    + "</function>\n</tool_call>{% endfor %}"
    + _END
)
PARAMETER_SHAPE = CallShape(
    "<tool_call>\n<function=",
    ">",
    "\n</function>\n</tool_call>",
    "",
    ParameterShape("\n<parameter=", ">\n", "\n</parameter>"),
)
PAIRS = (
    _TURNS
    + "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}\n"
    + "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>{{ '\\n' }}"
    + "<arg_value>{{ v }}</arg_value>{{ '\\n' }}{% endfor %}</tool_call>{% endfor %}"
    + _END
)
PAIR_SHAPE = CallShape(
    "<tool_call>",
    "",
    "\n</tool_call>",
    "",
    ParameterShape("\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"),
)
NUMBERED = (
    _TURNS
    + "{% for c in m.tool_calls or [] %}<tool_call>"
    + '{"id": "{{ c.id }}", "name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    + "</tool_call>{% endfor %}"
    + _END
)
SILENT = _TURNS + _END
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + SILENT


def with_template(bundled: LoadedModel, template: str | None) -> TokenizerWrapper:
    hf = copy.copy(bundled.tokenizer._tokenizer)
    hf.chat_template = template
    return TokenizerWrapper(hf, eos_token_ids=bundled.tokenizer.eos_token_ids)


def test_the_bundled_model(bundled: LoadedModel) -> None:
    found = tool_format(bundled.tokenizer)
    assert found is not None
    assert (found.name, found.start, found.end) == ("json_tools", "<tool_call>", "</tool_call>")
    assert found.shape == CallShape('<tool_call>{"name": "', '", "arguments": ', "}</tool_call>", "\n")


@pytest.mark.parametrize(
    ("template", "name", "shape"),
    [
        (HERMES, "json_tools", CallShape('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n")),
        (PARAMETERS, "qwen3_coder", PARAMETER_SHAPE),
        (PAIRS, "glm47", PAIR_SHAPE),
        (NUMBERED, "json_tools", None),
    ],
    ids=["hermes", "parameters", "pairs", "numbered"],
)
def test_what_a_template_writes_tells(bundled: LoadedModel, template: str, name: str, shape: CallShape | None) -> None:
    found = tool_format(with_template(bundled, template))
    assert found is not None
    assert (found.name, found.shape) == (name, shape)


def test_a_template_that_knows_no_tools_gets_them_as_text(bundled: LoadedModel) -> None:
    found = tool_format(with_template(bundled, SILENT))
    assert found is not None
    assert found.name == "json_tools"
    assert found.shape == CallShape('<tool_call>{"name": "', '", "arguments": ', "}</tool_call>", "\n")


@pytest.mark.parametrize(
    ("template", "knows"), [(SILENT, False), (HERMES, True), (SILENT + "{{ tools }}", True), (NO_SYSTEM, False)]
)
def test_whether_a_template_knows_tools(bundled: LoadedModel, template: str, knows: bool) -> None:
    assert template_knows_tools(with_template(bundled, template)) is knows
    assert template_knows_tools(bundled.tokenizer)


@pytest.mark.parametrize("template", [NO_SYSTEM, None, "{{ raise_exception('no') }}"])
def test_models_that_can_have_no_tools(bundled: LoadedModel, template: str | None) -> None:
    assert tool_format(with_template(bundled, template)) is None


def test_what_mlx_lm_says_comes_first(bundled: LoadedModel) -> None:
    """Also where the template doesn't write calls."""
    hf = copy.copy(bundled.tokenizer._tokenizer)
    hf.chat_template = SILENT
    wrapped = TokenizerWrapper(
        hf, tool_parser=mistral.parse_tool_call, tool_call_start="[TOOL_CALLS]", tool_call_end=""
    )
    found = tool_format(wrapped)
    assert found is not None
    assert (found.name, found.end, found.shape) == ("mistral", "", None)


@pytest.fixture(scope="module")
def plain() -> ToolFormat:
    return ToolFormat("json_tools", "<tool_call>", "</tool_call>", json_tools.parse_tool_call)


def test_calls_are_read(plain: ToolFormat) -> None:
    written = '\n{"name": "f", "arguments": {"a": "ü", "b": [1, null]}}\n'
    assert plain.read(written, []) == [Call("f", '{"a": "ü", "b": [1, null]}')]
    assert plain.read('{"name": "f"}', []) == [Call("f", "{}")]
    assert plain.read('{"name": "f", "arguments": "{\\"a\\": 1}"}', []) == [Call("f", '{"a": 1}')]


@pytest.mark.parametrize(
    "written",
    ["", "{", "[]", "null", "{}", '{"name": 3, "arguments": {}}', '{"name": "", "arguments": {}}',
     '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "x"}', '{"name": "f", "arguments": {"a": NaN}}'],
)  # fmt: skip
def test_malformed_calls_are_none(plain: ToolFormat, written: str) -> None:
    assert plain.read(written, []) is None


def test_several_calls_in_one(bundled: LoadedModel) -> None:
    format = ToolFormat("mistral", "[TOOL_CALLS]", "", mistral.parse_tool_call)
    calls = [{"name": "f", "arguments": {"a": 1}, "id": "x"}, {"name": "g", "arguments": {}}]
    read = format.read(json.dumps(calls), [])
    assert read is not None
    assert [(call.name, call.arguments) for call in read] == [("f", '{"a": 1}'), ("g", "{}")]
