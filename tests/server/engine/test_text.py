import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from server.engine.text import TextAssembler
from server.protocol import TextDelta
from turbocache.model import BUNDLED


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return load_tokenizer(BUNDLED)


def assemble(tokenizer: TokenizerWrapper, text: str, stop: tuple[str, ...] = (), prompt: str = "") -> list[TextDelta]:
    assembler = TextAssembler(tokenizer, tokenizer.encode(prompt), stop)
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


@pytest.mark.parametrize(("begun", "text"), [(False, "more words"), (True, " more words")])
def test_an_answer_that_goes_on_keeps_the_space_that_it_begins_with(
    tokenizer: TokenizerWrapper, begun: bool, text: str
) -> None:
    prompt = tokenizer.encode("There are")
    assembler = TextAssembler(tokenizer, prompt, (), begun=begun)
    parts = [part for token in tokenizer.encode(" more words") for part in assembler.add(token)] + assembler.finish()
    assert "".join(part.text for part in parts if isinstance(part, TextDelta)) == text
