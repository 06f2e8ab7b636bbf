"""A client that plays the script of an agent's day to a server, and what it asks our server besides."""

import json
import re
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.bench.day_ledger import Encoder, Ledger, Record
from tests.bench.day_script import Message, Sizes, Step, day

COUNTED = ("evictions", "spills", "restores", "restore_failures", "session_files_refused", "checkpoint_drops")
"""Our server's counters that say what became of sessions; beside these, what each turn went on from."""

RESIDENT = "resident"

Counters = Callable[[], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. `first_token`: seconds from the request to the first text, None if there was none."""

    text: str
    first_token: float | None
    prompt: int
    cached: int
    generated: int


def ask(client: OpenAI, model: str, messages: Sequence[Message], max_tokens: int, session: dict[str, Any]) -> Answer:
    """One greedy streamed answer. `session`: the arguments that name it. Raises OpenAIError, or RuntimeError when usage
    is missing.
    """
    start, first, text, usage = time.perf_counter(), None, "", None
    stream = client.chat.completions.create(
        model=model,
        messages=cast(list[ChatCompletionMessageParam], list(messages)),
        max_tokens=max_tokens,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
        **session,
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if piece := "".join(choice.delta.content or "" for choice in chunk.choices):
            first = first or time.perf_counter() - start
            text += piece
    if usage is None:
        raise RuntimeError("the stream held no usage although include_usage was set")
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens or 0) if details is not None else 0
    return Answer(text, first, usage.prompt_tokens, cached, usage.completion_tokens)


def named(step: Step) -> dict[str, Any]:
    """How a step's request names its session: half of the clients by `prompt_cache_key`, half by a header."""
    name = step.conversation.name
    if step.kind == "title":
        return {}
    if int(name.rsplit("-", 1)[1]) % 2:
        return {"extra_headers": {"X-Session-ID": name}}
    return {"prompt_cache_key": name}


def play(
    sizes: Sizes, seed: int, client: OpenAI, model: str, encoder: Encoder, counters: Counters | None = None
) -> list[Record]:
    """The whole day, one request at a time. `counters` is read after each of them."""
    ledger, records = Ledger(encoder), list[Record]()
    before = counters() if counters is not None else {}
    for step in day(sizes, seed):
        conversation, messages = step.conversation, step.send()
        prompt = encoder.prompt(messages)
        new = ledger.new_tokens(conversation.name, step.kind, prompt)
        limit = sizes.title_tokens if step.kind == "title" else sizes.answer_tokens
        answer = ask(client, model, messages, limit, named(step))
        n_answer = ledger.add(conversation.name, step.kind, messages, answer.text)
        if step.kind != "title":
            conversation.answered(answer.text)
        now = counters() if counters is not None else {}
        gained = {name: value - before.get(name, 0) for name, value in now.items() if name != RESIDENT}
        before = now
        records.append(
            Record(
                conversation=conversation.name,
                turn=step.turn,
                kind=step.kind,
                prompt=answer.prompt,
                counted=len(prompt),
                new=new,
                cached=answer.cached,
                answer=n_answer,
                generated=answer.generated,
                first_token=answer.first_token,
                events={name: value for name, value in gained.items() if value},
                resident=int(now[RESIDENT]) if RESIDENT in now else None,
            )
        )
    return records


def last_prompts(sizes: Sizes, seed: int, encoder: Encoder) -> list[int]:
    """Tokens of every conversation's last prompt, about: the answers are made up."""
    lengths: dict[str, int] = {}
    for step in day(sizes, seed):
        messages = step.send()
        if step.kind != "title":
            lengths[step.conversation.name] = len(encoder.prompt(messages))
            step.conversation.answered("river, stone, cloud, garden, window, letter, silver, engine")
    return list(lengths.values())


def bytes_of_session(client: OpenAI, model: str, encoder: Encoder, n_tokens: int) -> int:
    """Bytes that a session of `n_tokens` takes at rest, checkpoints not counted, as GET /v1/sessions tells them. Raises
    RuntimeError when it does not.
    """
    n_words = n_tokens
    while len(encoder.prompt([{"role": "user", "content": "river " * n_words}])) > n_tokens:
        n_words -= max(1, n_words // 50)
    ask(client, model, [{"role": "user", "content": "river " * n_words}], 1, {"prompt_cache_key": "measured"})
    for _ in range(40):
        rows = json.loads(_get(client, "/v1/sessions"))["data"]
        found = [row["bytes"] for row in rows if row["id"] == "measured" and row["bytes"]]
        if found:
            return sum(n for kind, n in found[0].items() if kind != "checkpoints")
        time.sleep(0.25)
    raise RuntimeError("/v1/sessions shows no bytes of a session whose turn has ended")


def counters_of(client: OpenAI) -> Counters:
    """Reads our server's counters: COUNTED, turns by what they went on from, and, RESIDENT, sessions in memory."""

    def read() -> dict[str, float]:
        text, found = _get(client, "/metrics"), dict[str, float]()
        for name, labels, value in re.findall(r"^turbocache_(\w+?)(?:_total)?(\{.*\})? (\S+)$", text, re.M):
            if name in COUNTED and float(value):
                found[name] = found.get(name, 0.0) + float(value)
            elif name == "checkpoint_hits":
                kind = re.search(r'kind="(\w+)"', labels)
                found[f"from {kind[1] if kind else '?'}"] = float(value)
            elif name == "sessions" and 'state="resident"' in labels:
                found[RESIDENT] = float(value)
        return found

    return read


def _get(client: OpenAI, path: str) -> str:
    url = str(client.base_url).removesuffix("/").removesuffix("/v1") + path
    with urllib.request.urlopen(url, timeout=30) as response:
        return str(response.read().decode())
