from dataclasses import replace

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from server.protocol import AnswerRules, TextDelta, Tool, ToolCall
from server.text.assembler import TextAssembler, Vocabulary
from server.text.chat_template import opening_state
from server.text.tool_formats import tool_format
from turbocache.models import BUNDLED


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return load_tokenizer(BUNDLED)


def assemble(tokenizer: TokenizerWrapper, text: str, stop: tuple[str, ...] = (), prompt: str = "") -> list[TextDelta]:
    assembler = TextAssembler(tokenizer, opening_state(tokenizer, tokenizer.encode(prompt)), stop)
    deltas = [delta for token in tokenizer.encode(text) for delta in assembler.add(token)]
    return deltas + assembler.finish()


def joined(deltas: list[TextDelta], channel: str = "content") -> str:
    return "".join(delta.text for delta in deltas if delta.channel == channel)


@pytest.mark.parametrize("text", ["plain words", "größer 你好 😀 e\u0301", "a\n\n  b"])
def test_text_arrives_whole_and_in_whole_characters(tokenizer: TokenizerWrapper, text: str) -> None:
    deltas = assemble(tokenizer, text)
    assert joined(deltas) == text
    assert all("\ufffd" not in delta.text for delta in deltas)


@pytest.mark.parametrize("stop", ["gamma", " ga", "mm", "😀"])
def test_a_stop_string_ends_the_text_wherever_tokens_are_cut(tokenizer: TokenizerWrapper, stop: str) -> None:
    text = "alpha beta gamma delta 😀 end"
    assert joined(assemble(tokenizer, text, (stop,))) == text.split(stop)[0]


def test_the_beginning_of_a_stop_string_is_held_back_and_given_out_at_the_end(tokenizer: TokenizerWrapper) -> None:
    assert joined(assemble(tokenizer, "alpha beta", ("beta gamma",))) == "alpha beta"


def test_reasoning_has_a_channel_of_its_own(tokenizer: TokenizerWrapper) -> None:
    deltas = assemble(tokenizer, "<think>because</think>so")
    assert joined(deltas, "reasoning") == "because"
    assert joined(deltas) == "so"
    opened = assemble(tokenizer, "because</think>so", prompt="<|im_start|>assistant\n<think>\n")
    assert joined(opened, "reasoning") == "because"


def test_tokens_of_a_thought_are_counted(tokenizer: TokenizerWrapper) -> None:
    assembler = TextAssembler(tokenizer, "normal", ())
    thought = tokenizer.encode("the river is near the mill")
    for token in [*tokenizer.encode("<think>"), *thought, *tokenizer.encode("</think>so it is")]:
        assembler.add(token)
    # The marks are several tokens each here: the last of the opening one and all but that of the closing one count.
    assert len(thought) < assembler.reasoned <= len(thought) + len(tokenizer.encode("</think>"))


@pytest.mark.parametrize(("begun", "text"), [(False, "more words"), (True, " more words")])
def test_an_answer_that_goes_on_keeps_the_space_that_it_begins_with(
    tokenizer: TokenizerWrapper, begun: bool, text: str
) -> None:
    assembler = TextAssembler(tokenizer, "normal", (), begun=begun, vocabulary=Vocabulary(tokenizer))
    parts = [part for token in tokenizer.encode(" more words") for part in assembler.add(token)] + assembler.finish()
    assert "".join(part.text for part in parts if isinstance(part, TextDelta)) == text


CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
RULES = AnswerRules((Tool("f"), Tool("g")))


def with_calls(
    tokenizer: TokenizerWrapper, text: str, rules: AnswerRules = RULES, stop: tuple[str, ...] = ()
) -> tuple[list[str], TextAssembler]:
    """What becomes of a text: its parts in their order, those in a row together, and calls as NAME(ARGUMENTS)."""
    assembler = TextAssembler(tokenizer, "normal", stop, rules, tool_format(tokenizer))
    events = [event for token in tokenizer.encode(text) for event in assembler.add(token)] + assembler.finish()
    parts: list[str] = []
    called = True
    for event in events:
        if isinstance(event, ToolCall):
            parts.append(f"{event.name}({event.arguments})")
        elif called:
            parts.append(event.text)
        else:
            parts[-1] += event.text
        called = isinstance(event, ToolCall)
    return parts, assembler


def test_text_around_calls_is_kept(tokenizer: TokenizerWrapper) -> None:
    parts, assembler = with_calls(tokenizer, f"Let me look. {CALL}\n{CALL.replace('f', 'g', 1)} Done.")
    assert parts == ["Let me look. ", 'f({"a": 1})', "\n", 'g({"a": 1})', " Done."]
    assert assembler.called
    assert not assembler.stopped


def test_every_call_has_an_id_of_its_own(tokenizer: TokenizerWrapper) -> None:
    assembler = TextAssembler(tokenizer, "normal", (), RULES, tool_format(tokenizer))
    events = [event for token in tokenizer.encode(CALL + CALL) for event in assembler.add(token)]
    ids = [event.id for event in events if isinstance(event, ToolCall)]
    assert len(set(ids)) == len(ids) == 2


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{</tool_call> and on",
        '<tool_call>{"name": "f", "arguments": [</tool_call>',
        '<tool_call>{"name": "f"',
    ],
)
def test_a_malformed_call_is_text_and_nothing_is_lost(tokenizer: TokenizerWrapper, text: str) -> None:
    parts, assembler = with_calls(tokenizer, text)
    assert "".join(parts) == text
    assert not assembler.called


def test_a_call_without_its_end_is_one_when_it_is_whole(tokenizer: TokenizerWrapper) -> None:
    assert with_calls(tokenizer, CALL.removesuffix("</tool_call>"))[0] == ['f({"a": 1})']


def test_one_call_ends_the_answer_where_only_one_may_be(tokenizer: TokenizerWrapper) -> None:
    parts, assembler = with_calls(tokenizer, f"{CALL}{CALL} and more", replace(RULES, parallel=False))
    assert parts == ['f({"a": 1})']
    assert assembler.stopped
    assert assembler.stop is None


def test_without_tools_a_call_is_text(tokenizer: TokenizerWrapper) -> None:
    assert with_calls(tokenizer, CALL, AnswerRules())[0] == [CALL]
    assert with_calls(tokenizer, CALL, replace(RULES, tool_choice="none"))[0] == [CALL]


def test_stop_strings_do_not_cut_calls(tokenizer: TokenizerWrapper) -> None:
    parts, assembler = with_calls(tokenizer, f"{CALL} now END of it", stop=("arguments", "END"))
    assert parts == ['f({"a": 1})', " now "]
    assert (assembler.stopped, assembler.stop) == (True, "END")


def test_the_end_mark_within_a_string_does_not_end_a_call(tokenizer: TokenizerWrapper) -> None:
    arguments = '{"text": "a</tool_call>b<tool_call>{"}'
    call = CALL.replace('{"a": 1}', arguments)
    assert with_calls(tokenizer, f"{call} and {CALL}")[0] == [f"f({arguments})", " and ", 'f({"a": 1})']
