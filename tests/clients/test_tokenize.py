"""Tokens of a text and of a conversation, in the shapes of vLLM's server, which tools ask for over plain HTTP."""

from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from tests.clients.talk import COPY, QUESTION
from tests.serving.launch import BUNDLED, Server


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"model": "default", **body})


@pytest.mark.parametrize("text", [COPY, "", "a", "line\nline", "12345"])
def test_a_text_becomes_the_tokenizers_own_tokens_and_a_text_again(
    server: Server, tokenizer: Tokenizer, text: str
) -> None:
    told = post(server, "/tokenize", prompt=text).json()
    assert told["tokens"] == tokenizer.encode(text).ids
    assert told["count"] == len(told["tokens"])
    assert told["max_model_len"] == 8192
    assert post(server, "/detokenize", tokens=told["tokens"]).json() == {"prompt": text}


def test_a_conversation_has_the_tokens_that_a_chat_counts(server: Server, client: openai.OpenAI) -> None:
    told = post(server, "/tokenize", messages=QUESTION).json()
    answer = client.chat.completions.create(model="default", messages=QUESTION, max_tokens=1)
    assert answer.usage is not None
    assert told["count"] == answer.usage.prompt_tokens
    text = post(server, "/detokenize", tokens=told["tokens"]).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\n")
    bare = post(server, "/tokenize", messages=QUESTION, add_generation_prompt=False).json()
    assert bare["tokens"] == told["tokens"][: bare["count"]]
    assert bare["count"] < told["count"]


def test_token_texts_on_demand(server: Server) -> None:
    told = post(server, "/tokenize", prompt="one two", return_token_strs=True).json()
    assert len(told["token_strs"]) == told["count"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 7}),
        ("/tokenize", {"prompt": "x", "messages": QUESTION}),
        ("/tokenize", {"prompt": "x", "colour": "green"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": ["a"]}),
    ],
)
def test_nonsense_is_refused(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = post(server, path, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
