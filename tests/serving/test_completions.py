"""Texts gone on with by the bundled model, and its tokens."""

import httpx
import pytest

from tests.serving.launch import Server

TEXT = "The river and the mill and the river and the mill and"


def test_a_text_goes_on_where_it_ends(server: Server) -> None:
    client = server.client()
    whole = client.completions.create(model="default", prompt=TEXT, max_tokens=6, temperature=0, echo=True)
    assert whole.choices[0].text.startswith(f"{TEXT} ")
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": TEXT}).json()["tokens"]
    same = client.completions.create(model="default", prompt=tokens, max_tokens=6, temperature=0)
    assert whole.choices[0].text == TEXT + same.choices[0].text
    assert whole.usage.prompt_tokens == len(tokens)


def test_marks_of_thoughts_are_text(server: Server) -> None:
    think = httpx.post(f"{server.url}/tokenize", json={"prompt": "<think>"}).json()["tokens"]
    assert len(think) == 1
    asked = {"model": "default", "prompt": TEXT, "max_tokens": 2, "logit_bias": {str(think[0]): 100}}
    assert httpx.post(f"{server.url}/v1/completions", json=asked).json()["choices"][0]["text"] == "<think><think>"


def test_prompts_are_answered_together_as_they_are_alone(server: Server) -> None:
    client = server.client()
    prompts = [TEXT, "The teacher walked to the garden near the"]
    together = client.completions.create(model="default", prompt=prompts, n=2, max_tokens=5, seed=3)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    for i, prompt in enumerate(prompts):
        alone = client.completions.create(model="default", prompt=prompt, n=2, max_tokens=5, seed=3)
        assert [c.text for c in alone.choices] == [c.text for c in together.choices[2 * i : 2 * i + 2]]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_texts(server: Server, stream: bool) -> None:
    asked = {"model": "default", "prompt": TEXT, "max_tokens": 8, "temperature": 0, "logprobs": 3}
    if stream:
        chunks = list(server.client().completions.create(**asked, stream=True))
        text = "".join(chunk.choices[0].text for chunk in chunks)
        shown = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    else:
        [choice] = server.client().completions.create(**asked).choices
        text, shown = choice.text, [choice.logprobs]
    tokens = [token for one in shown for token in one.tokens]
    assert "".join(tokens) == text
    offsets = [offset for one in shown for offset in one.text_offset]
    assert [text[offset:][: len(token)] for offset, token in zip(offsets, tokens, strict=True)] == tokens
    for one in shown:
        for token, logprob, top in zip(one.tokens, one.token_logprobs, one.top_logprobs, strict=True):
            assert len(top) == 3
            assert top[token] == logprob == max(top.values())


def test_tokens_and_back(server: Server) -> None:
    text = "Größe, 名前, 🙂 <|im_start|>user\n"
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert "<|im_start|>" in answer["token_strs"]
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_a_conversation_with_and_without_the_answers_opening(server: Server) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}]}
    opened = httpx.post(f"{server.url}/tokenize", json=asked).json()["tokens"]
    closed = httpx.post(f"{server.url}/tokenize", json={**asked, "add_generation_prompt": False}).json()["tokens"]
    assert opened[: len(closed)] == closed
    rest = httpx.post(f"{server.url}/detokenize", json={"tokens": opened[len(closed) :]}).json()["prompt"]
    assert rest == "<|im_start|>assistant\n"
