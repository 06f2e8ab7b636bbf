"""Conversations through a proxy: who answered each turn, what was cached, and what a client had to send again."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.fleet.proxy import SERVED_BY
from tests.processes import patient
from tests.serving.launch import filler

CHAT = "/v1/chat/completions"
LONGEST_SECONDS = 60.0
_TRIES = 6
_AGAIN = (429, 500, 502, 503, 504)
"""What SDKs send again."""


@dataclass(frozen=True)
class Turn:
    """One answered turn. `known` of its prompt's tokens were the prompt of the turn before."""

    server: str
    prompt: int
    cached: int
    known: int
    tries: int
    seconds: float

    @property
    def recomputed(self) -> int:
        return max(0, self.known - self.cached)


class Unanswered(AssertionError):
    """A turn that was given up."""


@dataclass
class Talk:
    """A conversation under a name, led by one client. Every other turn is streamed; `streaming` while text comes."""

    number: int
    max_tokens: int
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    streaming: bool = False

    @property
    def name(self) -> str:
        return f"talk-{self.number}"

    def turn(self, url: str, sentences: int) -> Turn:
        """Ask, and ask again where a client would: a lost connection, a broken stream, a server's error."""
        n, start = len(self.turns), time.monotonic()
        self.messages.append({"role": "user", "content": filler(sentences, 100 * self.number + n)})
        body = {
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": (n + self.number) % 2 == 1,
        }
        for tries in range(1, _TRIES + 1):
            try:
                text, usage, server = ask(url, body, self.name, self._begin)
                break
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in _AGAIN:
                    raise
                self.broken.append(_said(error))
                time.sleep(0.25 * tries)
            finally:
                self.streaming = False
        else:
            raise Unanswered(f"{self.name}, turn {n}: {self.broken}")
        self.messages.append({"role": "assistant", "content": text})
        known = self.turns[-1].prompt if self.turns else 0
        self.turns.append(Turn(server, *usage, known, tries, time.monotonic() - start))
        return self.turns[-1]

    def _begin(self) -> None:
        self.streaming = True

    def servers(self) -> list[str]:
        return [turn.server for turn in self.turns]


def ask(
    url: str, body: dict[str, object], name: str | None, begun: Callable[[], None] = lambda: None
) -> tuple[str, tuple[int, int], str]:
    """Text, prompt tokens with the cached ones among them, and which server answered. `begun` is called when a stream
    has its first text. Raises httpx.HTTPError.
    """
    headers = {} if name is None else {"X-Session-ID": name}
    body = {"model": "default", **body}
    if not body.get("stream"):
        answer = httpx.post(url + CHAT, json=body, headers=headers, timeout=patient(LONGEST_SECONDS))
        answer.raise_for_status()
        found = answer.json()
        return found["choices"][0]["message"]["content"], _usage(found), _server(answer)
    text, usage = "", None
    body["stream_options"] = {"include_usage": True}
    with httpx.stream("POST", url + CHAT, json=body, headers=headers, timeout=patient(LONGEST_SECONDS)) as answer:
        if answer.status_code != 200:
            answer.read()
            answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise httpx.RemoteProtocolError(f"ended by the server: {event['error']['message']}")
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if text:
                begun()
            usage = _usage(event) if event.get("usage") else usage
    if usage is None:
        raise httpx.RemoteProtocolError("the stream has no end")
    return text, usage, _server(answer)


def _said(error: httpx.HTTPError) -> str:
    return f"{error} {error.response.text}" if isinstance(error, httpx.HTTPStatusError) else repr(error)


def _usage(found: dict[str, Any]) -> tuple[int, int]:
    usage = found["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def _server(answer: httpx.Response) -> str:
    """Of those that nginx has asked the last, which answered."""
    return str(answer.headers.get(SERVED_BY, "")).split(", ")[-1]


def at_once(work: Sequence[Callable[[], object]]) -> None:
    """Each in a thread of its own; the first failure is raised when all have ended."""
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(one) for one in work]:
            done.result()


class Bystanders:
    """Further clients, which ask beside the conversations until they are told to stop: what agents ask under a
    session's name besides (a title, a summary), and prompts without a name.
    """

    def __init__(self, url: str, names: Iterable[str], n: int) -> None:
        self._url = url
        self._over = threading.Event()
        self.asked = 0
        self.broken = 0
        self.longest = 0.0
        chosen = list(names)
        self._threads = [
            threading.Thread(target=self._ask, args=(None if i % 2 else chosen[i % len(chosen)],)) for i in range(n)
        ]
        self._lock = threading.Lock()

    def _ask(self, name: str | None) -> None:
        n = 0
        while not self._over.is_set():
            start, n = time.monotonic(), n + 1
            body = {"messages": [{"role": "user", "content": f"A title: {filler(4, n)}"}], "max_tokens": 4}
            broken = 0
            try:
                ask(self._url, body, name)
            except httpx.HTTPError:
                broken = 1
            with self._lock:
                self.asked += 1
                self.broken += broken
                self.longest = max(self.longest, time.monotonic() - start)
            self._over.wait(0.2)

    def __enter__(self) -> "Bystanders":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
