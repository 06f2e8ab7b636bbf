"""Where turns begin. The oracle is the template itself: the ids of the messages before a turn."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.protocol import Conversation
from server.text.beginnings import Openings, beginnings, marked, openings, without_marks
from server.text.chat_template import PromptBuilder
from server.text.token_memo import ChatEncoder
from tests.server.text.test_token_memo import TEXTS, encoder_of
from turbocache.cache.outline import PLAIN, Outline
from turbocache.mlxlm.model import LoadedModel

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = [{"id": "c", "type": "function", "function": {"name": "look", "arguments": {}}}]
ASK: dict[str, Any] = {"role": "user", "content": "What is in the box?"}
LOOK: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": CALL}
SEEN: dict[str, Any] = {"role": "tool", "tool_call_id": "c", "content": "A red ball."}
SAY: dict[str, Any] = {"role": "assistant", "content": "A red ball."}
SYSTEM: dict[str, Any] = {"role": "system", "content": "You are kind."}


def length(loaded: LoadedModel, messages: list[dict[str, Any]], tools: Any = None) -> int:
    """Tokens of the messages, without the opening of an answer."""
    return len(loaded.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=False))


@settings(max_examples=100)
@given(texts=st.lists(TEXTS, min_size=1, max_size=9), system=st.one_of(st.none(), TEXTS))
def test_turns_begin_where_the_messages_before_end(bundled: LoadedModel, texts: list[str], system: str | None) -> None:
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    encoder, want = encoder_of(bundled), []
    for i, text in enumerate(texts):
        if i % 2 == 0:
            want.append(length(bundled, messages) if messages else 0)
        messages = [*messages, {"role": "user" if i % 2 == 0 else "assistant", "content": text}]
    conversation = Conversation(messages)
    assert encoder.beginnings(conversation, encoder.encode(conversation)) == (tuple(want), ())


def test_a_turn_holds_its_calls_and_results(bundled: LoadedModel) -> None:
    """Also of several calls at once, of calls one after the other, and of two messages of the user."""
    first = [SYSTEM, ASK, ASK, LOOK, SEEN, SEEN, LOOK, SEEN, SAY]
    messages = [*first, ASK, LOOK, SEEN]
    prompt = PromptBuilder(bundled, outlines=True).build(Conversation(messages, TOOLS))
    turns = [length(bundled, messages[:n], TOOLS) for n in (1, len(first))]
    steps = [length(bundled, messages[:n], TOOLS) for n in (6, 8, 12)]
    assert prompt.outline == Outline(turns[0], tuple(turns), tuple(steps))
    assert steps[-1] == prompt.messages_end


def test_results_that_are_written_as_messages_of_the_user_begin_no_turn(
    bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a template without tools."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    opening = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    monkeypatch.setattr(bundled.tokenizer._tokenizer, "chat_template", template + opening)
    prompt = PromptBuilder(bundled, outlines=True).build(
        Conversation([SYSTEM, ASK, LOOK, SEEN, SEEN, SAY, ASK, LOOK, SEEN], TOOLS)
    )
    text = bundled.tokenizer.decode(prompt.tokens)

    def place(part: str, n: int) -> int:
        """Tokens before the n-th time that a part comes."""
        return len(bundled.tokenizer.encode(part.join(text.split(part)[:n])))

    asked, answer = f"<|im_start|>user\n{ASK['content']}", "<|im_start|>assistant\n"
    assert prompt.outline == Outline(
        place(asked, 1), (place(asked, 1), place(asked, 2)), (place(answer, 2), place(answer, 4))
    )


def test_the_prefix_ends_where_the_first_turn_begins(bundled: LoadedModel) -> None:
    builder = PromptBuilder(bundled, outlines=True)
    for messages, tools in (([SYSTEM, ASK], []), ([ASK, SAY, ASK], TOOLS), ([SYSTEM, ASK], TOOLS)):
        prompt = builder.build(Conversation(messages, tools))
        assert prompt.outline.prefix == prompt.outline.turns[0] < prompt.system_end
    assert builder.build(Conversation([ASK])).outline == Outline(0, (0,))
    # An answer that comes before the first question is no part of the prefix.
    begun = builder.build(Conversation([SYSTEM, SAY, ASK]))
    assert begun.outline.prefix == begun.system_end < begun.outline.turns[0]
    assert PromptBuilder(bundled).build(Conversation([SYSTEM, ASK])).outline == PLAIN


IM = "<|im_start|>"
TEMPLATES = {
    # A role between two special tokens, contents without the space around them, a system message of its own.
    "stripped": f"{IM}system<|im_end|>Be kind.\n{{% for m in messages %}}{IM}{{{{ m.role }}}}<|im_end|>\n\n"
    "{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}" + IM + "assistant<|im_end|>\n\n{% endif %}",
    # Only the user's messages are opened.
    "bare": "{% for m in messages %}{% if m.role == 'user' %}" + IM + "{{ m.content }}<|im_end|>{% else %}"
    "{{ m.content }}<|endoftext|>{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_templates(bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(bundled.tokenizer._tokenizer, "chat_template", TEMPLATES[name])
    encoder = ChatEncoder(bundled.tokenizer)
    messages = [{"role": "user", "content": "  Hello  "}, SAY, {"role": "user", "content": "\nAgain"}, SAY, ASK]
    tokens = encoder.encode(Conversation(messages))
    first = 0 if name == "bare" else len(bundled.tokenizer.encode(f"{IM}system<|im_end|>Be kind.\n"))
    assert encoder.beginnings(Conversation(messages), tokens) == (
        (first, length(bundled, messages[:2]), length(bundled, messages[:4])),
        (),
    )


@pytest.mark.parametrize(
    "template",
    [
        # Nothing sets a message of the user apart.
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        # Contents are changed, left out, or come twice.
        "{% for m in messages %}" + IM + "user {{ m.content | length }}{% endfor %}",
        IM + "{{ messages[-1].content }}",
        "{% for m in messages %}" + IM + "{{ m.content }} {{ m.content }}{% endfor %}",
        # The marks change the text.
        "{% for m in messages %}" + IM + "user {{ m.content }}{{ 'x' if m.content[0] == 'W' }}{% endfor %}",
    ],
)
def test_places_that_are_not_known_are_left_out(
    bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(bundled.tokenizer._tokenizer, "chat_template", template)
    encoder = ChatEncoder(bundled.tokenizer)
    conversation = Conversation([ASK, SAY, ASK])
    assert encoder.beginnings(conversation, encoder.encode(conversation)) == ((), ())


def test_a_text_with_marks_of_its_own(bundled: LoadedModel) -> None:
    (one,) = marked([ASK]) or ()
    assert without_marks(one["content"]) == ASK["content"] != one["content"]
    assert marked([SAY, one]) is None
    encoder = encoder_of(bundled)
    assert encoder.beginnings(Conversation([one]), encoder.encode(Conversation([one]))) == ((), ())


def test_openings_need_a_template_that_only_appends() -> None:
    def render(messages: list[dict[str, Any]], answer: bool) -> str:
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + ("[assistant]" if answer else "")

    assert openings(render) == Openings("[user]", "[assistant]")
    assert openings(lambda messages, answer: str(len(messages)) + render(messages, answer)) == Openings()
    asked = marked([ASK]) or []
    assert beginnings(asked, render(asked, True), openings(render)) == ([0], [])
    assert beginnings(asked, render([*asked, *asked], True), openings(render)) is None
