"""server.text.tool_prompt: tools, calls and results as text, for templates that show none of them."""

from dataclasses import replace
from typing import Any

from mlx_lm.tool_parsers import json_tools

from server.protocol import Conversation
from server.text.chat_template import PromptBuilder
from server.text.tool_prompt import tools_as_text
from tests.server.text.test_tool_formats import SILENT, with_template
from turbocache.mlxlm.model import LoadedModel

USER = {"role": "user", "content": "Is it cold in Oslo?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SHOWN = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'


def called(content: str, *names: str) -> dict[str, Any]:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": {"city": "Tromsø"}}}
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c0", "content": text}


def test_tools_end_the_system_message() -> None:
    system = {"role": "system", "content": "Be brief."}
    shown = tools_as_text(Conversation([system, USER], [TOOL, TOOL]))
    assert shown.tools == []
    assert [message["role"] for message in shown.messages] == ["system", "user"]
    text = shown.messages[0]["content"]
    assert text.startswith("Be brief.\n\nYou can call these functions:\n")
    assert text.count(f"\n{SHOWN}\n") == 1  # the other one's first newline is this one's last
    assert text.count(SHOWN) == 2
    alone = tools_as_text(Conversation([USER], [TOOL, TOOL])).messages
    assert [alone[0]["content"], alone[1]] == [text.removeprefix("Be brief.\n\n"), USER]
    assert system == {"role": "system", "content": "Be brief."}


def test_calls_are_written_as_mlx_lm_reads_them() -> None:
    asked = [USER, called("Let me see.", "weather", "weather"), result("3 °C"), result("rain"), {**USER}]
    shown = tools_as_text(Conversation(asked)).messages
    assert [message["role"] for message in shown] == ["user", "assistant", "user", "user"]
    first, *calls = shown[1]["content"].split("\n")
    assert first == "Let me see."
    for call in calls:
        inside = call.removeprefix(json_tools.tool_call_start).removesuffix(json_tools.tool_call_end)
        assert json_tools.parse_tool_call(inside) == {"name": "weather", "arguments": {"city": "Tromsø"}}
    assert shown[2]["content"] == ("<tool_response>\n3 °C\n</tool_response>\n<tool_response>\nrain\n</tool_response>")
    assert "tool_calls" not in shown[1]
    assert tools_as_text(Conversation([USER, called("", "weather")])).messages[1]["content"].startswith("<tool_call>")


def test_arguments_that_are_no_object_stay_as_they_were_written() -> None:
    broken = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{oops"}}]}
    assert tools_as_text(Conversation([broken])).messages[0]["content"] == (
        '<tool_call>{"name": "f", "arguments": {oops}</tool_call>'
    )


def test_a_prompt_has_them(bundled: LoadedModel) -> None:
    builder = PromptBuilder(replace(bundled, tokenizer=with_template(bundled, SILENT)))
    talk = [USER, called("", "weather"), result("3 °C")]
    prompt = builder.build(Conversation(talk, [TOOL]))
    text = builder.decode(prompt.tokens)
    assert text.startswith("[system]You can call these functions:")
    assert text.endswith("[user]<tool_response>\n3 °C\n</tool_response>")
    assert prompt.after_tool_result
    # What every conversation with these tools begins with.
    assert SHOWN in builder.decode(prompt.tokens[: prompt.system_end])
