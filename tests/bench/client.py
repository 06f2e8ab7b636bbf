"""A small streaming chat client that stamps every chunk of text with the time it arrived.

It uses http.client and parses nothing while a stream runs, so that on a machine with few cores the client takes as
little as possible from the server it measures.
"""

import http.client
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]


class RequestFailed(RuntimeError):
    """The server answered with an error, or its stream was not the shape that the benchmark needs."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Times are `time.perf_counter()` seconds; `stamps` has one entry per chunk that held text."""

    text: str
    submitted: float
    stamps: tuple[float, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def ttft(self) -> float:
        """Seconds from the submit to the first text."""
        return self.stamps[0] - self.submitted

    @property
    def decode_rate(self) -> float:
        """Tokens per second between the first and the last streamed text."""
        return (self.completion_tokens - 1) / (self.stamps[-1] - self.stamps[0])

    def tokens_between(self, start: float, end: float) -> float:
        """Tokens streamed in the interval (start, end]; each chunk counts as an equal share of the answer."""
        chunks = sum(start < stamp <= end for stamp in self.stamps)
        return chunks * self.completion_tokens / len(self.stamps)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens, and what each of its chat requests carries besides messages and length."""

    port: int
    body: dict[str, Any]
    names_sessions: bool
    timeout: float = 600.0

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def chat(self, messages: Sequence[Message], max_tokens: int, session: str | None = None) -> Answer:
        """Stream one greedy chat answer to its end. `session` goes out as `prompt_cache_key` where the server knows it.

        Raises RequestFailed on an error status, an error inside the stream, no text, or missing usage.
        """
        body: dict[str, Any] = {
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.body,
        }
        if session is not None and self.names_sessions:
            body["prompt_cache_key"] = session
        payload = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        lines: list[tuple[float, bytes]] = []
        try:
            submitted = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RequestFailed(f"HTTP {response.status}: {response.read(2000).decode(errors='replace')}")
            while line := response.readline():
                if line.startswith(b"data:"):
                    lines.append((time.perf_counter(), line))
        finally:
            connection.close()
        return _parse(submitted, lines)

    def chat_together(
        self, prompts: Sequence[Sequence[Message]], max_tokens: int, session: str | None = None
    ) -> list[Answer]:
        """Stream all prompts at once, one thread each; session names are numbered. Raises the first failure."""
        answers: list[Answer | Exception | None] = [None] * len(prompts)
        barrier = threading.Barrier(len(prompts))

        def work(index: int) -> None:
            try:
                barrier.wait()
                name = None if session is None else f"{session}-{index}"
                answers[index] = self.chat(prompts[index], max_tokens, name)
            except Exception as error:  # handed to the caller below
                answers[index] = error

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done: list[Answer] = []
        for answer in answers:
            if not isinstance(answer, Answer):
                raise answer if answer is not None else RequestFailed("a stream ended without an answer")
            done.append(answer)
        return done


def _parse(submitted: float, lines: Sequence[tuple[float, bytes]]) -> Answer:
    text, finish, usage = "", "", None
    stamps: list[float] = []
    for stamp, line in lines:
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            break
        event = json.loads(data)
        if "error" in event:
            raise RequestFailed(f"error in the stream: {event['error']}")
        usage = event.get("usage") or usage
        for choice in event.get("choices", []):
            delta = choice.get("delta", {})
            piece = (delta.get("content") or "") + (delta.get("reasoning") or delta.get("reasoning_content") or "")
            if piece:
                text += piece
                stamps.append(stamp)
            finish = choice.get("finish_reason") or finish
    if not stamps:
        raise RequestFailed(f"the stream held no text (finish_reason {finish!r}, usage {usage})")
    if usage is None:
        raise RequestFailed("the stream held no usage although include_usage was set")
    return Answer(
        text=text,
        submitted=submitted,
        stamps=tuple(stamps),
        finish_reason=finish,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        completion_tokens=usage["completion_tokens"],
    )
