"""One client of a crowd: asks one thing after the other, streamed or whole, and now and then leaves before the end."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import httpx
import openai

from tests.serving.launch import filler
from tests.soak.wellformed import check_stream, check_whole, error_code

CHAT = "/v1/chat/completions"
_LEAVING = 1 / 3
_LEAVE_SECONDS = 3.0
_LONG = 120
_LONG_SHARE = 0.05
_PATIENCE_SECONDS = 180.0


class Refused(Exception):
    """429, to be asked again after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


class Client:
    """`ends` counts its requests by their ends (done, left, refused, wrong); `wrong` are sentences, each a failure.

    Every other client is OpenAI's, the others read what is on the wire.
    """

    def __init__(self, url: str, number: int, seed: int) -> None:
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._url = url
        self._number = number
        self._dice = random.Random(seed)

    async def ask(self, n_requests: int) -> None:
        """So many requests on connections of its own."""
        # Without certificates, which take longer to read than an answer takes.
        async with httpx.AsyncClient(base_url=self._url, timeout=None, verify=False) as plain:
            if self._number % 2:
                await self._ask(n_requests, lambda body: _plain(plain, body))
                return
            url = f"{self._url}/v1"
            client: Any = plain  # openai's type is that of a package with another name
            sdk = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=None, http_client=client)
            await self._ask(n_requests, lambda body: _by_sdk(sdk, body))

    async def _ask(self, n_requests: int, request: Callable[[dict[str, Any]], Coroutine[Any, Any, None]]) -> None:
        for _ in range(n_requests):
            leaves = self._dice.random() < _LEAVING
            patience = self._dice.uniform(0, _LEAVE_SECONDS) if leaves else _PATIENCE_SECONDS
            body, end = self._body(), "left"
            # A call that is cancelled closes its connection, wherever it is.
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    end = await self._end_of(request(body))
            if end == "left" and not leaves:
                end = "wrong"
                self.wrong.append(f"no end within {patience:g} s: {body}")
            self.ends[end] += 1

    async def _end_of(self, request: Coroutine[Any, Any, None]) -> str:
        try:
            await request
        except Refused as refusal:
            await asyncio.sleep(refusal.seconds * self._dice.random())
            return "refused"
        except (AssertionError, ValueError, LookupError, TypeError, httpx.HTTPError, openai.OpenAIError) as error:
            self.wrong.append(f"{type(error).__name__}: {error}")
            return "wrong"
        return "done"

    def _body(self) -> dict[str, Any]:
        dice = self._dice
        n_sentences = _LONG if dice.random() < _LONG_SHARE else dice.randrange(1, 25)
        text = f"{self._number}: {filler(n_sentences, dice.randrange(1000))}"
        body: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": text}]}
        body |= {"max_tokens": dice.randrange(2, 40), "temperature": dice.choice((0, 1))}
        if dice.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        # Names of its own, names that others use at the same time, or none.
        if (name := dice.choice((None, f"own-{self._number}", f"shared-{dice.randrange(8)}"))) is not None:
            body["prompt_cache_key"] = name
        return body


async def _plain(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """Raises Refused, or AssertionError and ValueError for what is not as it must be."""
    async with http.stream("POST", CHAT, json=body) as response:
        lines = [line async for line in response.aiter_lines() if line]
    text = "\n".join(lines)
    if response.status_code == 429:
        assert error_code(text.encode()) == "rate_limit_exceeded", text
        raise Refused(float(response.headers["retry-after"]))
    assert response.status_code == 200, f"{response.status_code} {text}"
    if "stream" in body:
        check_stream([line.removeprefix("data: ") for line in lines if line[0] != ":"], body["max_tokens"])
    else:
        check_whole(text.encode(), body["max_tokens"])


async def _by_sdk(sdk: openai.AsyncOpenAI, body: dict[str, Any]) -> None:
    """Raises Refused, openai's errors, or AssertionError for an answer without just one end."""
    try:
        answer = await sdk.chat.completions.create(**body)
    except openai.RateLimitError as error:
        if error.code == "rate_limit_exceeded":
            raise Refused(float(error.response.headers["retry-after"])) from error
        raise
    if "stream" in body:
        reasons = [choice.finish_reason async for chunk in answer for choice in chunk.choices]
    else:
        reasons = [choice.finish_reason for choice in answer.choices]
    assert reasons[-1] in ("stop", "length"), reasons
    assert not any(reasons[:-1]), reasons
