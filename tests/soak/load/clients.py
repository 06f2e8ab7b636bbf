"""A client that does anything that clients do, at random."""

import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx

from tests.serving.launch import filler
from tests.soak.wellformed import check_row, check_stream, check_whole, error_code

CHAT = "/v1/chat/completions"
NAMES = [f"shared-{i}" for i in range(6)]
_STRANGE = ["nobody", "a/b c?d#e%", "é ü", "..", "x" * 300, "unnamed-000000000000", "~"]
_SYSTEMS = [f"You are a careful assistant. {filler(8, seed)}" for seed in (1, 2)]
_POSITIONS = 1024
_MOST_MESSAGES = 9
_BAD: list[Any] = [
    b"{not json",
    b"",
    {"messages": []},
    {"messages": [{"role": "wizard", "content": "x"}]},
    {"temperature": "hot"},
    {"max_tokens": -1},
    {"max_tokens": 10**30},
    {"colour": "green"},
    {"prompt_cache_key": "a\u0000b"},
    {"prompt_cache_key": "n" * 300},
    {"tools": [{"type": "function"}]},
    {"model": "another"},
]
_FULL = {429: "rate_limit_exceeded", 503: "out_of_memory"}
_TOO_LONG = {400: "context_length_exceeded"}


class Client:
    """Does one thing after the other. `done` counts what by its outcome, `wrong` are sentences."""

    def __init__(self, url: str, seed: int) -> None:
        self.done: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self._dice = random.Random(seed)
        self._http = httpx.Client(base_url=url, timeout=120)
        self._me = seed
        self._histories: dict[str | None, list[dict[str, str]]] = {}
        self._known: list[str] = list(NAMES)
        self._deeds: dict[Callable[[], str], int] = {
            self._whole: 14,
            self._stream: 14,
            self._leave: 9,
            self._edit: 8,
            self._too_long: 3,
            self._nonsense: 6,
            self._list: 6,
            self._look: 6,
            self._delete: 6,
            self._fork: 9,
            self._save: 7,
            self._restore: 9,
        }

    def close(self) -> None:
        self._http.close()

    def act(self) -> None:
        """One thing. Notes what is wrong about the answer."""
        (deed,) = self._dice.choices(list(self._deeds), list(self._deeds.values()))
        name = deed.__name__.strip("_")
        try:
            self.done[name, deed()] += 1
        except (AssertionError, ValueError, LookupError, TypeError, httpx.HTTPError) as error:
            self.done[name, "wrong"] += 1
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")

    # Turns.

    def _whole(self) -> str:
        name, messages = self._ask_on()
        body = self._body(name, messages)
        response = self._http.post(CHAT, json=body)
        if response.status_code != 200:
            return self._refused(response, _FULL | _TOO_LONG, name)
        self._keep(name, messages, check_whole(response.content, body["max_tokens"]))
        return "200"

    def _stream(self) -> str:
        name, messages = self._ask_on()
        body = self._body(name, messages) | {"stream": True, "stream_options": {"include_usage": True}}
        with self._http.stream("POST", CHAT, json=body) as response:
            if response.status_code != 200:
                response.read()
                return self._refused(response, _FULL | _TOO_LONG, name)
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        if lines[-1].startswith('{"error"'):
            code = error_code(lines[-1].encode())
            assert code in _FULL.values(), f"{code} in a stream"
            return f"200 {code}"
        self._keep(name, messages, check_stream(lines, body["max_tokens"]))
        return "200"

    def _leave(self) -> str:
        """Ask, and go away before the answer is there or while it comes."""
        name, messages = self._ask_on()
        body = self._body(name, messages)
        if self._dice.random() < 0.5:
            del body["max_tokens"]
        if self._dice.random() < 0.5:
            try:
                response = self._http.post(CHAT, json=body, timeout=self._dice.uniform(0.005, 0.2))
            except httpx.TimeoutException:
                return "left"
            return (
                str(response.status_code)
                if response.status_code == 200
                else self._refused(response, _FULL | _TOO_LONG, name)
            )
        with self._http.stream("POST", CHAT, json=body | {"stream": True}) as response:
            if response.status_code != 200:
                response.read()
                return self._refused(response, _FULL | _TOO_LONG, name)
            for _ in zip(range(self._dice.randrange(1, 20)), response.iter_lines(), strict=False):
                pass
        return "left"

    def _edit(self) -> str:
        """A conversation that goes back, and on from there in other words."""
        name = self._dice.choice([None, *NAMES])
        history = self._histories.get(name, [])
        self._histories[name] = history[: 2 * self._dice.randrange(len(history) // 2 + 1)]
        return self._whole()

    def _too_long(self) -> str:
        body = self._body(None, [{"role": "user", "content": filler(_POSITIONS // 8, self._me)}])
        if self._dice.random() < 0.5:
            body = self._body(None, [{"role": "user", "content": "Hello!"}]) | {"max_tokens": _POSITIONS}
        return self._refused(self._http.post(CHAT, json=body), _TOO_LONG, None)

    def _nonsense(self) -> str:
        bad = self._dice.choice(_BAD)
        if not isinstance(bad, bytes):
            bad = json.dumps({**self._body(None, [{"role": "user", "content": "Hello!"}]), **bad}).encode()
        response = self._http.post(CHAT, content=bad)
        assert response.status_code in (400, 404), f"{response.status_code} {response.text}"
        error_code(response.content)
        return str(response.status_code)

    # Sessions.

    def _list(self) -> str:
        response = self._http.get("/v1/sessions")
        assert response.status_code == 200, response.text
        listing = response.json()
        assert listing["object"] == "list"
        for row in listing["data"]:
            check_row(row)
        ids = [row["id"] for row in listing["data"]]
        assert len(set(ids)) == len(ids), ids
        self._known = [*NAMES, *ids]
        return "200"

    def _look(self) -> str:
        return self._row(*self._about("GET"), {404: "session_not_found"})

    def _delete(self) -> str:
        id, response = self._about("DELETE")
        if response.status_code == 200:
            assert response.json() == {"id": id, "object": "session.deleted", "deleted": True}, response.text
            return "200"
        return self._row(id, response, {404: "session_not_found", 409: "session_running"})

    def _fork(self) -> str:
        new = self._dice.choice([None, f"fork-{self._dice.randrange(8)}"])
        id, response = self._about("POST", "/fork", None if new is None else {"id": new})
        if response.status_code == 200 and new is None:
            new = response.json()["id"]
            assert new != id
        allowed = {404: "session_not_found", 409: "session_running session_exists session_file_refused"}
        return self._row(id, response, allowed | {503: "out_of_memory session_not_saved"}, new)

    def _save(self) -> str:
        allowed = {404: "session_not_found", 409: "session_running", 503: "session_not_saved"}
        return self._row(*self._about("POST", "/save"), allowed)

    def _restore(self) -> str:
        allowed = {404: "session_not_found", 409: "session_running", 503: "out_of_memory session_not_saved"}
        return self._row(*self._about("POST", "/restore"), allowed)

    def _about(self, method: str, change: str = "", body: Any = None) -> tuple[str, httpx.Response]:
        """A request about some session: known, perhaps somebody else's, or none."""
        id = self._dice.choice(_STRANGE) if self._dice.random() < 0.15 else self._dice.choice(self._known)
        return id, self._http.request(method, f"/v1/sessions/{quote(id, safe='')}{change}", json=body)

    def _row(self, id: str, response: httpx.Response, allowed: dict[int, str], row_id: str | None = None) -> str:
        """The outcome of a request about session `id`, whose answer is the row of session `row_id`."""
        if response.status_code == 200:
            row = response.json()
            check_row(row)
            assert row["id"] == (row_id or id), f"{row['id']} instead of {row_id or id}"
            return "200"
        if id in _STRANGE:
            allowed = allowed | {400: "invalid_value string_above_max_length"}
            if response.status_code == 404:
                return "404"
        return self._refused(response, allowed, None)

    # What is common to them.

    def _ask_on(self) -> tuple[str | None, list[dict[str, str]]]:
        """A conversation, named or not, with something new at its end."""
        dice = self._dice
        name = dice.choice([None, *NAMES, *NAMES, f"mine-{self._me}"])
        history = self._histories.get(name, [])
        if len(history) >= _MOST_MESSAGES:
            history = []
        if not history and dice.random() < 0.7:
            history = [{"role": "system", "content": dice.choice(_SYSTEMS)}]
        text = filler(dice.randrange(1, 12), dice.randrange(40))
        return name, [*history, {"role": "user", "content": text}]

    def _body(self, name: str | None, messages: list[dict[str, str]]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": "default", "messages": messages, "max_tokens": self._dice.randrange(1, 24)}
        body["temperature"] = self._dice.choice((0, 1))
        return body if name is None else body | {"prompt_cache_key": name}

    def _keep(self, name: str | None, messages: list[dict[str, str]], answer: str) -> None:
        self._histories[name] = [*messages, {"role": "assistant", "content": answer}]

    def _refused(self, response: httpx.Response, allowed: dict[int, str], name: str | None) -> str:
        """The outcome of a request that was refused for one of the reasons that there may be for it."""
        code = error_code(response.content)
        reasons = allowed.get(response.status_code, "").split()
        assert code in reasons, f"{response.status_code} {response.text}"
        if code == "context_length_exceeded":
            self._histories.pop(name, None)
        return f"{response.status_code} {code}"
