import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from server.protocol import Conversation
from server.text import token_memo
from server.text.chat_template import PromptBuilder
from server.text.token_memo import ChatEncoder
from turbocache.mlxlm.model import LoadedModel

TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(
            ["<|im_end|>", "<|im_start|>", "<|im_", "start|>", "<", " ", "\n", "  ", "a", "Hello", "12", "é", "🙂",
             "<think>", "</think>", "<|endoftext|>", "user\n", "\u0301"]
        ),
        max_size=12,
    ).map("".join),
)  # fmt: skip


def encode_whole(loaded: LoadedModel, messages: list[dict[str, Any]]) -> list[int]:
    return list(loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True))


@settings(max_examples=150)
@given(texts=st.lists(TEXTS, min_size=1, max_size=7), system=st.one_of(st.none(), TEXTS))
def test_ids_are_those_of_the_whole_text(bundled: LoadedModel, texts: list[str], system: str | None) -> None:
    """Turn by turn, as a conversation grows: cold and remembered pieces, special tokens within the text included."""
    encoder = encoder_of(bundled)
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for i, text in enumerate(texts):
        messages = [*messages, {"role": "user" if i % 2 == 0 else "assistant", "content": text}]
        for _ in range(2):
            assert encoder.encode(Conversation(messages)) == encode_whole(bundled, messages)


_encoders: list[ChatEncoder] = []


def encoder_of(loaded: LoadedModel) -> ChatEncoder:
    if not _encoders:
        _encoders.append(ChatEncoder(loaded.tokenizer))
    return _encoders[0]


def test_a_later_turn_tokenises_only_what_is_new(bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ChatEncoder(bundled.tokenizer)
    assert encoder.uses_cache
    messages = [{"role": "user", "content": "word " * 500}]
    encoder.encode(Conversation(messages))
    seen = []
    encode = bundled.tokenizer._tokenizer.encode
    monkeypatch.setattr(
        bundled.tokenizer._tokenizer, "encode", lambda text, **options: [seen.append(text), encode(text, **options)][1]
    )
    messages += [{"role": "assistant", "content": "Okay."}, {"role": "user", "content": "And now?"}]
    assert len(encoder.encode(Conversation(messages))) > 500
    assert "".join(seen).count("word") == 0
    assert "And now?" in "".join(seen)


def test_memory_is_bounded(bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_memo, "_MAX_CHARACTERS", 1000)
    encoder = ChatEncoder(bundled.tokenizer)
    for i in range(30):
        messages = [{"role": "user", "content": f"{i} " * 60}]
        assert encoder.encode(Conversation(messages)) == encode_whole(bundled, messages)
        assert sum(len(piece) for piece in encoder._pieces) == encoder._n_characters <= 1000
    long = [{"role": "user", "content": "x" * 5000}]
    assert encoder.encode(Conversation(long)) == encode_whole(bundled, long)


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_look_at_their_neighbours_are_no_place_to_cut(bundled: LoadedModel, option: str) -> None:
    tokenizer = copy.deepcopy(bundled.tokenizer)
    for token in ("<|im_start|>", "<|im_end|>"):
        tokenizer._tokenizer._tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False, **{option: True})]
        )
    encoder = ChatEncoder(tokenizer)
    assert not encoder.uses_cache
    messages = [{"role": "user", "content": " spaces   around  "}]
    assert encoder.encode(Conversation(messages)) == list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    )


def test_a_tokenizer_that_gives_other_ids_to_pieces_is_used_plainly(
    bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = bundled.tokenizer._tokenizer.encode
    monkeypatch.setattr(bundled.tokenizer._tokenizer, "encode", lambda text, **options: [7, *encode(text, **options)])
    assert not ChatEncoder(bundled.tokenizer).uses_cache


@pytest.mark.parametrize(
    ("other", "token", "runs"),
    [("<|a|>", "<|a|>", False), ("<<", "<|a|>", True), ("<", "<|a|>", False), ("x<|a|>y", "<|a|>", True)],
)
def test_overlapping_tokens(other: str, token: str, runs: bool) -> None:
    assert token_memo._may_overlap(other, token) is runs


def test_where_conversations_part(bundled: LoadedModel) -> None:
    encoder = ChatEncoder(bundled.tokenizer)
    system = {"role": "system", "content": "You are kind."}
    asked = [system, {"role": "user", "content": "Hello!"}]
    tokens, other = (
        encoder.encode(Conversation([system, {"role": "user", "content": text}])) for text in ("Hello!", "Bye.")
    )
    end = encoder.system_end(Conversation(asked), tokens)
    assert tokens[:end] == other[:end]
    assert end > len(encoder.encode(Conversation([{"role": "user", "content": ""}])))
    closed = list(bundled.tokenizer.apply_chat_template(asked, add_generation_prompt=False))
    assert tokens[: encoder.messages_end(tokens)] == closed
    assert 0 < len(closed) < len(tokens)
    assert encoder.system_end(Conversation(asked[1:]), tokens) == 0
    assert encoder.messages_end(closed) == 0


def test_a_prompt_knows_whether_a_tool_or_the_user_has_the_last_word(bundled: LoadedModel) -> None:
    builder, asked = PromptBuilder(bundled), [{"role": "user", "content": "Hello!"}]
    assert not builder.build(Conversation(asked)).after_tool_result
    result = {"role": "tool", "content": "12", "tool_call_id": "x"}
    assert builder.build(
        Conversation([*asked, {"role": "assistant", "content": "Let me look."}, result])
    ).after_tool_result
