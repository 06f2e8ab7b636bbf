"""The `anthropic` package on messages: shapes, the order of events, counting, sessions and refusals."""

from typing import Any

import anthropic
import pytest
from anthropic.types import Message

from tests.clients.conftest import KEYS
from tests.clients.talk import CODE, COPY, LONG, QUESTION, wait_for, wait_until_idle
from tests.serving.launch import Server, digits, filler

# The package has no argument for the temperature any more.
COLD = {"temperature": 0}
ASK: dict[str, Any] = {"model": "default", "max_tokens": 40, "messages": QUESTION, "extra_body": COLD}
REPEAT: dict[str, Any] = {**ASK, "messages": [{"role": "user", "content": f"Repeat after me: {COPY}"}]}


def text(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def read(message: Message) -> int:
    """Tokens of the prompt, wherever they came from."""
    usage = message.usage
    return usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)


def test_a_question_about_the_conversation_is_answered(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(**ASK)
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny-recall-4bit")
    assert message.id.startswith("msg_")
    assert digits(text(message)) == CODE
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens > 0


def test_a_stream_has_the_documented_order(claude: anthropic.Anthropic) -> None:
    events = list(claude.messages.create(**REPEAT, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start, last = events[0], events[-2]
    assert start.type == "message_start"
    assert (start.message.content, start.message.stop_reason) == ([], None)
    assert start.message.usage.input_tokens + (start.message.usage.cache_read_input_tokens or 0) > 0
    assert last.type == "message_delta"
    assert last.delta.stop_reason == "end_turn"
    assert last.usage.output_tokens > 0
    heard = "".join(
        event.delta.text for event in events if event.type == "content_block_delta" and event.delta.type == "text_delta"
    )
    assert heard == COPY


def test_the_stream_helper_accumulates_the_message(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(**REPEAT) as stream:
        assert "".join(stream.text_stream) == COPY
        assert stream.get_final_text() == COPY
        assert stream.get_final_message().stop_reason == "end_turn"


def test_system_text_and_blocks_are_taken(claude: anthropic.Anthropic) -> None:
    blocks = [{"type": "text", "text": "Answer briefly.", "cache_control": {"type": "ephemeral"}}]
    told, got, asked = QUESTION
    split = [{"type": "text", "text": "My name is Anna and"}, {"type": "text", "text": f"my locker code is {CODE}."}]
    for system in ("Answer briefly.", blocks):
        message = claude.messages.create(
            **{**ASK, "messages": [{**told, "content": split}, got, asked]},
            system=system,
            metadata={"user_id": "someone"},
        )
        assert digits(text(message)) == CODE


def test_stop_sequences_and_limits_have_their_reasons(claude: anthropic.Anthropic) -> None:
    stopped = claude.messages.create(**REPEAT, stop_sequences=["nowhere", "ûlée"])
    assert text(stopped) == COPY.split("ûlée")[0]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "ûlée")
    with claude.messages.stream(**REPEAT, stop_sequences=["ûlée"]) as stream:
        final = stream.get_final_message()
    assert (text(final), final.stop_reason, final.stop_sequence) == (text(stopped), "stop_sequence", "ûlée")
    cut = claude.messages.create(**{**REPEAT, "max_tokens": 3})
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)


def test_tokens_are_counted_as_a_message_counts_them(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model="default", messages=QUESTION, system="Answer briefly.")
    assert counted.input_tokens == read(claude.messages.create(**ASK, system="Answer briefly."))


def test_a_second_turn_reads_the_first_from_the_cache(claude: anthropic.Anthropic) -> None:
    first = claude.messages.create(**ASK)
    talk = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": "What is my name?"}]
    second = claude.messages.create(**{**ASK, "messages": talk})
    assert "Anna" in text(second)
    assert second.usage.cache_read_input_tokens == read(first) + first.usage.output_tokens
    assert second.usage.input_tokens + second.usage.cache_read_input_tokens == read(second)


def test_claude_codes_session_header_names_it_and_its_changing_line_does_not_break_the_prefix(
    claude: anthropic.Anthropic, server: Server
) -> None:
    def turn(messages: list[dict[str, Any]], mark: str) -> Message:
        line = f"x-anthropic-billing-header: cc_version=2.1.{len(mark)}.{mark}; cc_entrypoint=cli; cch={mark};"
        system = [{"type": "text", "text": line}, {"type": "text", "text": "Answer briefly. " + filler(20, 77)}]
        asked = {**ASK, "messages": messages, "system": system}
        return claude.messages.create(**asked, extra_headers={"X-Claude-Code-Session-Id": "claude-code"})

    first = turn(QUESTION, "a1b2c")
    talk = [*QUESTION, {"role": "assistant", "content": text(first)}, {"role": "user", "content": "What is my name?"}]
    second = turn(talk, "f00d")
    assert second.usage.cache_read_input_tokens == read(first) + first.usage.output_tokens
    assert server.sessions()["claude-code"]["name"] == "claude-code"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"extra_body": {"colour": "green"}}, "colour"),
        ({"extra_body": {"temperature": 3}}, "temperature"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        # The words by which programs know that they must shorten the conversation.
        ({"max_tokens": 8000, "messages": [{"role": "user", "content": filler(120, 1)}]}, "context"),
    ],
)
def test_a_wrong_request_is_a_bad_request_error_in_anthropics_shape(
    claude: anthropic.Anthropic, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=said) as caught:
        claude.messages.create(**{**ASK, **changes})
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert said in caught.value.body["error"]["message"]


def test_another_model_is_not_found(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(**{**ASK, "model": "another"})
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "not_found_error"


def of(narrow: Server, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=narrow.url, max_retries=0, _strict_response_validation=True, **options)


def test_keys_are_taken_from_either_header_and_wrong_ones_refused(narrow: Server) -> None:
    for right in ({"api_key": KEYS[0]}, {"auth_token": KEYS[1]}):
        with of(narrow, **right) as client:
            assert digits(text(client.messages.create(**ASK))) == CODE
    with of(narrow, api_key="wrong") as client, pytest.raises(anthropic.AuthenticationError) as caught:
        client.messages.create(**ASK)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "authentication_error"


def test_too_large_a_body_has_its_own_error(narrow: Server) -> None:
    large = [{"role": "user", "content": "x" * 70_000}]
    with of(narrow, api_key=KEYS[0]) as client, pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(**{**ASK, "messages": large})
    assert caught.value.status_code == 413
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "request_too_large"


def test_a_full_queue_is_a_rate_limit_error_and_streams_that_are_left_make_room(narrow: Server) -> None:
    long = {**ASK, "max_tokens": 4000, "messages": [{"role": "user", "content": LONG}]}
    with of(narrow, api_key=KEYS[0]) as client:
        streams = [client.messages.create(**long, stream=True)]
        wait_for(narrow, "requests_running", 1)
        streams.append(client.messages.create(**long, stream=True))
        wait_for(narrow, "requests_waiting", 1)
        with pytest.raises(anthropic.RateLimitError) as caught:
            client.messages.create(**ASK)
        for stream in streams:
            stream.close()
        wait_until_idle(narrow)
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["type"] == "rate_limit_error"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with pytest.raises(anthropic.APITimeoutError):
            client.with_options(timeout=0.3).messages.create(
                **{**ASK, "messages": [{"role": "user", "content": filler(200, 9)}]}
            )
        wait_until_idle(narrow)
