"""server.api.anthropic.request: what is accepted, what reaches the chat template, what is refused by which name."""

import json
from typing import Any

import pytest

from server.api.anthropic.content import SIGNATURE, signature_of
from server.api.anthropic.request import CountTokensRequest, MessagesRequest
from server.errors import InvalidRequest, UnsupportedField
from server.http.routing import parse as parse_body
from server.protocol import AnswerRules, SamplingParams, Tool

USER = {"role": "user", "content": "hi"}
CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1"}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
ATTRIBUTION = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=36ee5;"

# The parameters of `messages.create` in version 2.14 of Anthropic's package, beta ones included, but for those that
# travel as headers; the sampling parameters that it has left out since; and `output_format` of the beta.
SPEC = {
    "billing_policy",
    "cache_control",
    "compaction",
    "container",
    "context_management",
    "diagnostics",
    "fallback_credit_token",
    "fallbacks",
    "inference_geo",
    "max_tokens",
    "mcp_servers",
    "messages",
    "metadata",
    "model",
    "output_config",
    "output_format",
    "service_tier",
    "speed",
    "stop_sequences",
    "stream",
    "system",
    "temperature",
    "thinking",
    "thread",
    "tool_choice",
    "tools",
    "top_k",
    "top_p",
}


def parse(**fields: Any) -> MessagesRequest:
    body = {"model": "m", "messages": [USER], "max_tokens": 9, **fields}
    return parse_body(MessagesRequest, json.dumps(body).encode())


def refusal(**fields: Any) -> InvalidRequest:
    """Of the body, or of the conversation or the rules in it."""

    def read() -> None:
        body = parse(**fields)
        body.conversation()
        body.rules()

    with pytest.raises(InvalidRequest) as caught:
        read()
    return caught.value


def rendered(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return parse(messages=list(messages), **fields).conversation().messages


def test_every_field_of_the_spec_is_known() -> None:
    assert set(MessagesRequest.model_fields) == SPEC


def test_a_count_takes_all_that_makes_a_prompt() -> None:
    body = {"model": "m", "messages": [USER], "system": "s", "tools": [TOOL], "tool_choice": {"type": "auto"}}
    counted = parse_body(CountTokensRequest, json.dumps({**body, "thinking": {"type": "disabled"}}).encode())
    assert counted.conversation().messages[0] == {"role": "system", "content": "s"}
    with pytest.raises(InvalidRequest, match="max_tokens"):
        parse_body(CountTokensRequest, json.dumps({**body, "max_tokens": 1}).encode())


def test_null_counts_as_not_given() -> None:
    body = parse(**dict.fromkeys(SPEC - {"model", "messages", "max_tokens"}))
    assert body.sampling() == SamplingParams()
    assert body.rules() == AnswerRules(param="output_config.format.schema")
    assert (body.user_id, body.hides_thoughts) == (None, False)


def test_sampling() -> None:
    assert parse(temperature=0, top_k=3, top_p=0.5).sampling() == SamplingParams(0.0, 0.5, 3)


@pytest.mark.parametrize(
    "neutral",
    [
        {"service_tier": "auto"},
        {"service_tier": "standard_only"},
        {"speed": "standard"},
        {"mcp_servers": []},
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"cache_control": {"type": "ephemeral"}},
        {"system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "scope": "global"}}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "t", "citations": None, **CACHED}]}]},
        {"tools": [{**TOOL, "type": "custom", "eager_input_streaming": True, "allowed_callers": ["direct"], **CACHED}]},
        {"tools": [{**TOOL, "defer_loading": False, "input_examples": []}], "tool_choice": {"type": "none"}},
        {"metadata": {"user_id": None}},
        {"diagnostics": {"previous_message_id": None}},
        {"stop_sequences": []},
    ],
)
def test_neutral_values_pass(neutral: dict[str, Any]) -> None:
    parse(**neutral)


def block(kind: str, role: str = "user") -> dict[str, Any]:
    """A conversation with a block of this kind in its second place."""
    return {"messages": [USER, {"role": role, "content": [{"type": "text", "text": "t"}, {"type": kind}]}]}


NOT_HONOURED: list[tuple[dict[str, Any], str]] = [
    ({"speed": "fast"}, "speed"),
    ({"container": "c"}, "container"),
    ({"inference_geo": "us"}, "inference_geo"),
    ({"mcp_servers": [{"type": "url", "url": "u", "name": "n"}]}, "mcp_servers"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
    ({"output_config": {"task_budget": {"type": "tokens", "total": 5}}}, "output_config.task_budget"),
    ({"tools": [{"type": "web_search_20250305", **TOOL}]}, "tools[0].type"),
    ({"tools": [TOOL, {**TOOL, "defer_loading": True}]}, "tools[1].defer_loading"),
    ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools[0].input_examples"),
    ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20260120"]}]}, "tools[0].allowed_callers"),
    (block("image"), "messages[1].content[1].type"),
    (block("document"), "messages[1].content[1].type"),
    (block("tool_use"), "messages[1].content[1].type"),
    (block("tool_result", "assistant"), "messages[1].content[1].type"),
    (block("server_tool_use", "assistant"), "messages[1].content[1].type"),
    (block("image", "system"), "messages[1].content[1].type"),
    (
        {"messages": [{"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}]},
        "messages[0].content[0].content[0].type",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{**USE, "toolset_name": "browser"}]}]},
        "messages[0].content[0].toolset_name",
    ),
]


@pytest.mark.parametrize(("fields", "param"), NOT_HONOURED)
def test_known_but_not_honoured_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert isinstance(error, UnsupportedField)
    assert error.param == param
    assert "supported by this version" in error.message


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "'max_tokens'"),
    ({"max_tokens": 0}, "'max_tokens': integer below minimum value. Expected a value >= 1"),
    ({"temperature": 1.5}, "'temperature': decimal above maximum"),
    ({"messages": []}, "'messages': empty array"),
    ({"messages": [{"role": "user", "content": []}]}, "'messages[0].content': empty array"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "Supported values are: 'user', 'assistant', 'system'"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "'messages[0].content[0].type'"),
    ({"messages": [{"role": "user", "content": [{**RESULT, "tool_use_id": ""}]}]}, "content[0].tool_use_id"),
    ({"thinking": {"type": "enabled"}}, "'thinking.budget_tokens' is required"),
    ({"thinking": {"type": "disabled", "budget_tokens": 9}}, "'thinking.budget_tokens' is only allowed"),
    ({"tools": [{**TOOL, "name": "two words"}]}, "tools[0].name"),
    ({"tool_choice": {"type": "any"}}, "'tool_choice' is only allowed when 'tools'"),
    ({"tool_choice": {"type": "required"}}, "Supported values are: 'auto', 'any', 'tool', 'none'"),
    ({"output_format": FORMAT, "output_config": {"format": FORMAT}}, "at the same time"),
    ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, "Supported values are: '5m' or '1h'"),
    ({"n": 2}, "Unrecognized request argument supplied: n"),
]
CONTRADICTORY: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "assistant", "content": ""}]}, "At least one message must have content"),
    ({"messages": [USER, {"role": "assistant", "content": [USE]}]}, "must have a `tool_result` block"),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]}]},
        "not from a thought",
    ),
    ({"tools": [TOOL, TOOL]}, "two of them are called 'weather'"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "clock"}}, "'clock' not found"),
    (
        {"output_format": FORMAT, "messages": [USER, {"role": "assistant", "content": "{"}]},
        "'output_format' can't be combined",
    ),
]
"""What no JSON schema can say."""


@pytest.mark.parametrize(("fields", "words"), [*WRONG, *CONTRADICTORY])
def test_wrong_values(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(**fields).message


def test_strings_and_blocks_are_the_same_text() -> None:
    blocks = [{"type": "text", "text": "hi", **CACHED}]
    expected = [{"role": "system", "content": "hi"}, {"role": "user", "content": "hi"}]
    assert rendered(USER, system="hi") == expected
    assert rendered({"role": "user", "content": blocks}, system=blocks) == expected


def test_messages_of_one_role_are_one_turn() -> None:
    assert rendered(USER, USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, USER) == [
        {"role": "user", "content": "hi\nhi"},
        {"role": "assistant", "content": "a\nb"},
        USER,
    ]


def test_calls_and_their_results() -> None:
    answer = [
        {"type": "thinking", "thinking": "Oslo.", "signature": "s"},
        {"type": "redacted_thinking", "data": "secret"},
        {"type": "text", "text": "Let me see."},
        USE,
        {**USE, "id": "toolu_2", "caller": {"type": "direct"}},
    ]
    results = [
        {**RESULT, "content": [{"type": "text", "text": "rain"}, {"type": "text", "text": "wind"}], **CACHED},
        {**RESULT, "tool_use_id": "toolu_2", "content": "no such city", "is_error": True},
        {"type": "text", "text": "Well?"},
    ]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    assert rendered(USER, {"role": "assistant", "content": answer}, {"role": "user", "content": results}) == [
        USER,
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Oslo.",
            "tool_calls": [{"id": "toolu_1", **call}, {"id": "toolu_2", **call}],
        },
        {"role": "tool", "content": "rain\nwind", "tool_call_id": "toolu_1", "name": "weather"},
        {"role": "tool", "content": "Error: no such city", "tool_call_id": "toolu_2", "name": "weather"},
        {"role": "user", "content": "Well?"},
    ]


@pytest.mark.parametrize(
    ("signature", "thought"),
    [(signature_of("hm 🙂"), "hm 🙂"), (SIGNATURE, None), ("EqQBCgIYAhIM", None), ("", None)],
)
def test_a_thought_that_was_not_shown_comes_back(signature: str, thought: str | None) -> None:
    blocks = [{"type": "thinking", "thinking": "", "signature": signature}, {"type": "text", "text": "a"}]
    assert rendered(USER, {"role": "assistant", "content": blocks}, USER)[1].get("reasoning_content") == thought


@pytest.mark.parametrize("signature", ["turbocache:aGk", "turbocache:/w==", "turbocache:ä"])
def test_a_damaged_signature_is_refused(signature: str) -> None:
    blocks = [{"type": "thinking", "thinking": "", "signature": signature}]
    assert "signature was changed" in refusal(messages=[USER, {"role": "assistant", "content": blocks}]).message


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({}, ""),
        ({"content": []}, ""),
        ({"is_error": True}, "Error: "),
        ({"content": "Error!", "is_error": True}, "Error!"),
    ],
)
def test_results_of_few_words(result: dict[str, Any], text: str) -> None:
    assert rendered({"role": "user", "content": [{**RESULT, **result}]})[-1]["content"] == text


def test_instructions_within_a_conversation_are_text() -> None:
    now = {"role": "system", "content": [{"type": "text", "text": "Speak French."}]}
    assert rendered(now, USER, now, system="Be brief.") == [
        {"role": "system", "content": "Be brief.\nSpeak French."},
        {"role": "user", "content": "hi\n<system-reminder>\nSpeak French.\n</system-reminder>"},
    ]


@pytest.mark.parametrize(
    "system",
    [
        f"{ATTRIBUTION}\nYou are an agent.",
        [{"type": "text", "text": ATTRIBUTION}, {"type": "text", "text": "You are an agent."}],
        [{"type": "text", "text": f"{ATTRIBUTION}\nYou are an agent."}],
    ],
)
def test_the_attribution_line_does_not_reach_the_prompt(system: Any) -> None:
    assert rendered(USER, system=system) == [{"role": "system", "content": "You are an agent."}, USER]


def test_attribution_alone_is_no_system_prompt_and_elsewhere_it_is_text() -> None:
    said = {"role": "user", "content": ATTRIBUTION}
    assert rendered(said, system=[{"type": "text", "text": ATTRIBUTION}]) == [said]


def test_an_answer_that_was_begun_is_continued() -> None:
    begun = {"role": "assistant", "content": "The answer is "}
    conversation = parse(messages=[USER, begun]).conversation()
    assert (conversation.messages, conversation.continue_final_message) == ([USER, begun], True)
    assert not parse(messages=[USER, begun, USER]).conversation().continue_final_message
    empty = parse(messages=[USER, {"role": "assistant", "content": []}]).conversation()
    assert (empty.messages, empty.continue_final_message) == ([USER], False)


@pytest.mark.parametrize(
    ("fields", "thinking", "effort"),
    [
        ({}, None, None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, True, None),
        ({"thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "low"}}, True, "low"),
    ],
)
def test_thinking_is_a_permission(fields: dict[str, Any], thinking: bool | None, effort: str | None) -> None:
    conversation = parse(**fields).conversation()
    assert (conversation.thinking, conversation.reasoning_effort, conversation.ignore_unknown_effort) == (
        thinking,
        effort,
        True,
    )


def test_tools() -> None:
    body = parse(tools=[{**TOOL, "strict": True, **CACHED}, {"name": "b", "input_schema": {}}])
    assert body.rules().tools == (
        Tool("weather", SCHEMA, True, "tools[0].input_schema"),
        Tool("b", {}, False, "tools[1].input_schema"),
    )
    assert body.conversation().tools == [
        {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "b", "parameters": {}}},
    ]


@pytest.mark.parametrize(
    ("choice", "mode", "allowed", "parallel"),
    [
        (None, "auto", None, True),
        ({"type": "auto"}, "auto", None, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", None, False),
        ({"type": "any", "disable_parallel_tool_use": False}, "required", None, True),
        ({"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, "required", {"weather"}, False),
        ({"type": "none"}, "none", None, True),
    ],
)
def test_tool_choice(choice: Any, mode: str, allowed: set[str] | None, parallel: bool) -> None:
    rules = parse(tools=[TOOL], tool_choice=choice).rules()
    assert (rules.tool_choice, rules.allowed_tools, rules.parallel) == (mode, allowed, parallel)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"output_config": {"format": FORMAT}}, "output_config.format.schema"),
        ({"output_format": FORMAT}, "output_format.schema"),
    ],
)
def test_structured_output(fields: dict[str, Any], param: str) -> None:
    rules = parse(**fields).rules()
    assert (rules.schema, rules.param) == (SCHEMA, param)
