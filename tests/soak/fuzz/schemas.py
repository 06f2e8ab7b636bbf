"""Answers held to random JSON schemas, by a hot model behind a real server. The judge is the package jsonschema."""

import json
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import httpx
from jsonschema import Draft202012Validator

from server.settings import Settings
from tests.soak.fuzz.random_schemas import UNSUPPORTED, Schema, SchemaMaker
from tests.soak.served import serving
from turbocache.models import BUNDLED

_ASK = "Tell me about the old harbour as JSON."
_MOST_TOKENS = 1000


@dataclass(slots=True)
class Result:
    """`ends` counts answers by their finish reason."""

    ends: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        ends = ", ".join(f"{n} {reason}" for reason, n in sorted(self.ends.items()))
        return [
            f"  answers: {ends}; {self.tokens} tokens; those that ended by themselves satisfy their schemas",
            f"  schemas that can't be held to: {self.refused} of {len(UNSUPPORTED)} refused",
            f"  failures {len(self.wrong)}",
            *(f"  {sentence}" for sentence in self.wrong),
        ]


def run(
    count: int,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
    *,
    temperature: float = 1.5,
    most_tokens: int = _MOST_TOKENS,
    together: int = 8,
) -> Result:
    """`count` schemas at this temperature, so many `together` in a batch; then schemas that must be refused."""
    result, maker, dice = Result(), SchemaMaker(seed), random.Random(seed)
    asked = [(maker.schema(), dice.randrange(1 << 30)) for _ in range(count)]
    with (
        serving(Settings(model=str(BUNDLED), max_batch=together)) as served,
        httpx.Client(base_url=served.url, timeout=600) as http,
    ):
        with ThreadPoolExecutor(together) as pool:
            for done, one in enumerate(pool.map(partial(_answer, http, temperature, most_tokens), asked), 1):
                _judge(result, *one)
                if done % 50 == 0:
                    say(f"{done} of {count} schemas, {len(result.wrong)} failures")
        for schema in UNSUPPORTED:
            response = http.post("/v1/chat/completions", json=_body(schema, 0, temperature, most_tokens))
            if response.status_code == 400 and "response_format" in (response.json()["error"]["param"] or ""):
                result.refused += 1
            else:
                result.wrong.append(f"{response.status_code} for {json.dumps(schema)}: {response.text[:300]}")
        result.wrong += served.errors
    return result


def _body(schema: Schema, seed: int, temperature: float, most_tokens: int) -> dict[str, object]:
    format = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    return {
        "model": "default",
        "messages": [{"role": "user", "content": _ASK}],
        "temperature": temperature,
        "seed": seed,
        "max_tokens": most_tokens,
        "response_format": format,
    }


def _answer(
    http: httpx.Client, temperature: float, most_tokens: int, asked: tuple[Schema, int]
) -> tuple[Schema, int, httpx.Response]:
    schema, seed = asked
    return schema, seed, http.post("/v1/chat/completions", json=_body(schema, seed, temperature, most_tokens))


def _judge(result: Result, schema: Schema, seed: int, response: httpx.Response) -> None:
    if response.status_code != 200:
        result.wrong.append(f"{response.status_code} for {json.dumps(schema)}: {response.text[:300]}")
        return
    body = response.json()
    choice = body["choices"][0]
    result.ends[choice["finish_reason"]] += 1
    result.tokens += body["usage"]["completion_tokens"]
    if choice["finish_reason"] != "stop":
        return
    content = choice["message"]["content"]
    judge = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    try:
        problem = next((error.message for error in judge.iter_errors(json.loads(content))), None)
    except ValueError as error:
        problem = f"no JSON: {error}"
    if problem is not None:
        result.wrong.append(f"{problem} in {content!r}, seed {seed}, for {json.dumps(schema)}")
