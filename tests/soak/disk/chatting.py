"""Clients that hold the talks with a server which may die at any moment."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.soak.disk.talks import MAX_TOKENS, Talk

_AGAIN_SECONDS = 0.05
_HANG_UP = 0.15
_LATER = ("rate_limit_exceeded", "out_of_memory")


class Gone(Exception):
    """The server is no longer there, or says that it is about to go."""


class Refused(Exception):
    """The server answers with an error that has no business here."""


class Later(Exception):
    """The server has no room at the moment."""


@dataclass(frozen=True, slots=True)
class Said:
    """What came of a turn: its text so far, and, if it came to its end, how many of its tokens were cached."""

    text: str
    cached: int | None


@dataclass(slots=True)
class Tally:
    """What clients saw, over all rounds. `wrong` are sentences, each a failure."""

    turns: int = 0
    hung_up: int = 0
    cut_off: int = 0
    later: int = 0
    wrong_texts: int = 0
    wrong: list[str] = field(default_factory=list)


def ask(http: httpx.Client, talk: Talk, turn: int, leave: Callable[[], bool]) -> Said:
    """Stream one greedy turn; when `leave` says so, hang up. Raises Gone, Later or Refused."""
    body: dict[str, Any] = {"model": "default", "messages": talk.messages(turn), "max_tokens": MAX_TOKENS}
    body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    if talk.name is not None:
        body["prompt_cache_key"] = talk.name
    text, cached = "", None
    try:
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise _refusal(json.loads(response.read())["error"])
            for event in _events(response):
                if "error" in event:
                    raise _refusal(event["error"])
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                if usage := event.get("usage"):
                    cached = usage["prompt_tokens_details"]["cached_tokens"]
                if cached is None and leave():
                    return Said(text, None)
    except httpx.TransportError as error:
        raise Gone(type(error).__name__) from error
    if cached is None:
        raise Gone("the stream ended early")
    return Said(text, cached)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def _refusal(error: dict[str, Any]) -> Exception:
    if error["code"] in ("engine_dead", "shutting_down"):
        return Gone(error["message"])
    return Later(error["message"]) if error["code"] in _LATER else Refused(f"{error['code']}: {error['message']}")


class Chatting:
    """Some clients at one server, for as long as it lives."""

    def __init__(self, url: str, talks: Sequence[Talk], turns: dict[int, int], dice: random.Random, tally: Tally):
        """`turns[i]` is the turn that talk `i` is at, and is kept up to date."""
        self._url = url
        self._talks = talks
        self._turns = turns
        self._dice = dice
        self._tally = tally
        self._lock = threading.Lock()
        self._taken: set[int] = set()
        self._leaving = threading.Event()

    def open(self, clients: int) -> None:
        """Ask the first turn of every talk."""
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda i: self._turn(i, leave=False), range(len(self._talks))))

    def go_on(self, held: dict[int, int], clients: int) -> Counter[str]:
        """Ask the next turn of talks that a file holds so many tokens of. Says how many went on from just these."""
        with ThreadPoolExecutor(clients) as pool:
            return Counter(pool.map(self._restored, held, held.values()))

    @contextmanager
    def talking(self, clients: int) -> Iterator[None]:
        """Clients talk in whatever talk is free until the server is gone."""
        threads = [threading.Thread(target=self._talk, name=f"client-{i}") for i in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._leaving.set()
            for thread in threads:
                thread.join()

    def leave(self) -> None:
        """No client begins another turn, and some hang up on the one that they are in."""
        self._leaving.set()

    def _restored(self, i: int, held: int) -> str:
        try:
            said = self._turn(i, leave=False)
        except (Gone, Refused) as error:
            self._note(f"{self._name(i)}: no answer from a file of {held} tokens: {error}")
            return "not answered"
        if said.cached == held:
            return "restored"
        self._note(f"{self._name(i)}: a whole file of {held} tokens, but {said.cached} were cached")
        return "not restored"

    def _talk(self) -> None:
        while not self._leaving.is_set() and (i := self._take()) is not None:
            try:
                self._turn(i, leave=True)
            except Gone:
                with self._lock:
                    self._tally.cut_off += 1
                return
            except Refused as error:
                self._note(f"{self._name(i)}: {error}")
                return
            finally:
                with self._lock:
                    self._taken.discard(i)

    def _take(self) -> int | None:
        with self._lock:
            free = [i for i, talk in enumerate(self._talks) if self._turns[i] < len(talk) and i not in self._taken]
            if not free:
                return None
            self._taken.add(chosen := self._dice.choice(free))
            return chosen

    def _turn(self, i: int, leave: bool) -> Said:
        """One turn of a talk, again and again while the server has no room for it."""
        turn, talk = self._turns[i], self._talks[i]
        with self._lock:
            hurried = leave and self._dice.random() < _HANG_UP
            at_the_end = self._dice.random() < 0.5

        def hang_up() -> bool:
            return hurried or (leave and at_the_end and self._leaving.is_set())

        with httpx.Client(base_url=self._url, timeout=60) as http:
            while True:
                try:
                    said = ask(http, talk, turn, hang_up)
                    break
                except Later:
                    with self._lock:
                        self._tally.later += 1
                    time.sleep(_AGAIN_SECONDS)
        self._judge(i, turn, said)
        return said

    def _judge(self, i: int, turn: int, said: Said) -> None:
        right = self._talks[i].answers[turn]
        if said.text != right and (said.cached is not None or not right.startswith(said.text)):
            self._note(f"{self._name(i)}, turn {turn}: {said.text!r} instead of {right!r}")
            self._tally.wrong_texts += 1
        with self._lock:
            self._tally.turns += said.cached is not None
            self._tally.hung_up += said.cached is None
            self._turns[i] = turn + 1

    def _name(self, i: int) -> str:
        return self._talks[i].name or f"unnamed talk {i}"

    def _note(self, what: str) -> None:
        with self._lock:
            self._tally.wrong.append(what)
