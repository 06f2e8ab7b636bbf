"""The measures. Each takes both servers, keeps one of them busy at a time, and changes their order every repetition."""

import dataclasses
import json
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.bench.client import Answer, Endpoint, Message, RequestFailed
from tests.bench.machine import fp16_bytes_per_token, model_config
from tests.bench.prompts import SHORT_TURNS, assistant, long_answers, reading, user
from tests.bench.report import Row, Target
from tests.bench.servers import Server

ACKNOWLEDGED = "Okay, I have read it."


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes and repetitions of a run."""

    generate: int = 128
    short_tokens: int = 200
    long_tokens: int = 4096
    bytes_tokens: int = 8192
    streams: int = 8
    single_repeats: int = 7
    stream_repeats: int = 5
    conversations: int = 3
    warm_turns: int = 5


QUICK = Plan(generate=64, single_repeats=2, stream_repeats=1, conversations=1, warm_turns=3)


@dataclass(frozen=True, slots=True)
class Pair:
    """Our server and the one it is compared with."""

    ours: Server
    theirs: Server

    @property
    def both(self) -> list[Endpoint]:
        """Both endpoints, ours first."""
        return [self.ours.endpoint, self.theirs.endpoint]

    def order(self, repeat: int) -> Iterator[tuple[int, Server]]:
        """(0, ours) and (1, theirs); the other way round when `repeat` is odd."""
        sides = [(0, self.ours), (1, self.theirs)]
        return iter(sides if repeat % 2 == 0 else sides[::-1])


def long_context(pair: Pair, plan: Plan, per_word: float) -> list[list[Message]]:
    """A conversation with `long_tokens` in its first turn and a last turn that both servers answer at length.

    The first turn is sent by itself, so that in session "context-0" it is prefilled once.
    """
    first = reading("context", round(plan.long_tokens / per_word))
    for endpoint in pair.both:
        endpoint.chat(first, 16, "context-0")
    prefix = [*first, assistant(ACKNOWLEDGED)]
    n_words = round(plan.short_tokens / per_word)
    return long_answers(pair.both, prefix, n_words, 1, plan.generate, 1, "context")


def single_stream(
    pair: Pair, plan: Plan, name: str, prompts: Sequence[list[Message]], session: str, target: Target
) -> Row:
    """Tokens per second between the first and the last token of one stream."""
    pairs: list[tuple[float, float]] = []
    taken: list[tuple[Answer, Answer]] = []
    for repeat in range(plan.single_repeats):
        answers: dict[int, Answer] = {}
        for side, server in pair.order(repeat):
            answers[side] = server.endpoint.chat(prompts[repeat % len(prompts)], plan.generate, session)
        taken.append((answers[0], answers[1]))
        pairs.append((answers[0].decode_rate, answers[1].decode_rate))
    prompt = statistics.median(ours.prompt_tokens for ours, _ in taken)
    note = f"{prompt:.0f} prompt tokens; {_lengths(taken)}; {len(pairs)} pairs"
    return Row(f"single stream, {name}", "tokens/s", 1, True, pairs, target, note)


def many_streams(pair: Pair, plan: Plan, prompts: Sequence[list[Message]], target: Target) -> list[Row]:
    """Tokens per second of several streams at once, on freshly started servers: in all, and while all are decoding."""
    whole: list[tuple[float, float]] = []
    steady: list[tuple[float, float]] = []
    taken: list[tuple[Answer, Answer]] = []
    for repeat in range(plan.stream_repeats):
        sides: dict[int, list[Answer]] = {}
        for side, server in pair.order(repeat):
            server.restart()
            server.endpoint.chat_together([reading(f"warm-up-{index}", 8) for index in range(len(prompts))], 4, "warm")
            sides[side] = server.endpoint.chat_together(prompts, plan.generate, "stream")
        taken += zip(sides[0], sides[1], strict=True)
        whole.append((_whole_rate(sides[0]), _whole_rate(sides[1])))
        rates = (_steady_rate(sides[0]), _steady_rate(sides[1]))
        if min(rates) > 0:
            steady.append(rates)
    count = len(prompts)
    note = f"{count} prompts of {taken[0][0].prompt_tokens} tokens, not cached; {_lengths(taken)}; {len(whole)} pairs"
    rows = [Row(f"{count} streams, first submit to last token", "tokens/s", 1, True, whole, target, note)]
    if steady:
        note = f"from the last stream's first token to the first stream's last; {len(steady)} pairs"
        rows.append(Row(f"{count} streams, decode only", "tokens/s", 1, True, steady, None, note))
    return rows


def _whole_rate(answers: Sequence[Answer]) -> float:
    seconds = max(answer.stamps[-1] for answer in answers) - min(answer.submitted for answer in answers)
    return sum(answer.completion_tokens for answer in answers) / seconds


def _steady_rate(answers: Sequence[Answer]) -> float:
    start = max(answer.stamps[0] for answer in answers)
    end = min(answer.stamps[-1] for answer in answers)
    return sum(answer.tokens_between(start, end) for answer in answers) / (end - start) if end > start else 0.0


def _lengths(taken: Sequence[tuple[Answer, Answer]]) -> str:
    """Says whether both sides generated equally many tokens (up to 2)."""
    ours = [answer.completion_tokens for answer, _ in taken]
    theirs = [answer.completion_tokens for _, answer in taken]
    equal = sum(abs(a - b) <= 2 for a, b in zip(ours, theirs, strict=True))
    if equal == len(taken):
        return f"{min(ours)} tokens each" if min(ours) == max(ours) else f"{min(ours)}–{max(ours)} tokens, equal"
    spans = f"{min(ours)}–{max(ours)} / {min(theirs)}–{max(theirs)}"
    return f"**lengths differ** in {len(taken) - equal} of {len(taken)}: {spans}"


def first_tokens(pair: Pair, plan: Plan, per_word: float, seeded: bool, target: Target) -> list[Row]:
    """Time to first token of later turns on `long_tokens` cached tokens, and of the first turn that prefilled them.

    `seeded` sends mlx_lm.server a seed: it then serves the request outside its batch, which saves it some copies of
    the cache and gives it its best warm turn. Greedy answers do not depend on it.
    """
    warm: list[tuple[Answer, Answer]] = []
    cold: list[tuple[Answer, Answer]] = []
    for conversation in range(plan.conversations):
        first = reading(f"conversation-{conversation}", round(plan.long_tokens / per_word))
        histories: dict[int, list[Message]] = {0: list(first), 1: list(first)}
        for turn in range(1 + plan.warm_turns):
            answers: dict[int, Answer] = {}
            for side, server in pair.order(conversation + turn):
                endpoint = server.endpoint
                if seeded and server.kind == "mlx-lm":
                    endpoint = dataclasses.replace(endpoint, body={**endpoint.body, "seed": 0})
                answers[side] = endpoint.chat(histories[side], 16, f"conversation-{conversation}")
                question = user(SHORT_TURNS[turn % len(SHORT_TURNS)])
                histories[side] += [assistant(answers[side].text), question]
            (cold if turn == 0 else warm).append((answers[0], answers[1]))
    shape = ", seeded requests" if seeded else ""
    note = f"{_cached(warm)}; {len(warm)} pairs in {plan.conversations} conversations{shape}"
    return [
        Row("time to first token, warm turn", "s", 3, False, _ttfts(warm), target, note),
        Row("time to first token, cold turn", "s", 2, False, _ttfts(cold), None, f"{_cached(cold)}; {len(cold)} pairs"),
    ]


def _ttfts(taken: Sequence[tuple[Answer, Answer]]) -> list[tuple[float, float]]:
    return [(ours.ttft, theirs.ttft) for ours, theirs in taken]


def _cached(taken: Sequence[tuple[Answer, Answer]]) -> str:
    """Cached tokens as each server tells them, of the prompt's tokens (medians)."""
    sides = []
    for side in zip(*taken, strict=True):
        cached = statistics.median(answer.cached_tokens for answer in side)
        sides.append(f"{cached:.0f} of {statistics.median(answer.prompt_tokens for answer in side):.0f}")
    return f"cached tokens {sides[0]} / {sides[1]}"


def bytes_per_token(ours: Server, plan: Plan, per_word: float, target: Target) -> Row:
    """Bytes that our server holds per cached token, against fp16 by the model's shape.

    `ours` is freshly started and serves this one long conversation only, so that all it holds belongs to it. Raises
    RequestFailed where /metrics or /v1/sessions do not show the conversation within ten seconds after its answer.
    """
    config = model_config(ours.model)
    limit = min(plan.bytes_tokens, config.get("max_position_embeddings", plan.bytes_tokens))
    answer = ours.endpoint.chat(reading("bytes", round(0.97 * limit / per_word)), 16, "bytes")
    kinds, held = _held(ours.endpoint, answer.prompt_tokens)
    fp16 = fp16_bytes_per_token(config)
    parts = ", ".join(f"{kind} {value / 1e6:.2f} MB" for kind, value in sorted(kinds.items()))
    note = f"{held} tokens held ({ours.preset}): {parts}; fp16 computed from the model's shape"
    pairs = [(sum(kinds.values()) / held, float(fp16))]
    return Row("bytes per cached token, against fp16", "B", 0, False, pairs, target, note)


def _held(endpoint: Endpoint, at_least: int) -> tuple[dict[str, float], int]:
    """Cache bytes by kind and tokens held in all sessions, once two readings agree (the gauges lag a little)."""
    before: tuple[dict[str, float], int] = ({}, 0)
    for _ in range(20):
        time.sleep(0.5)
        gauges = re.findall(
            r'^turbocache_cache_bytes\{[^}]*kind="(\w+)"[^}]*\} (\S+)', endpoint.get("/metrics")[1], re.M
        )
        sessions = json.loads(endpoint.get("/v1/sessions")[1])
        if isinstance(sessions, dict):
            sessions = sessions.get("data") or sessions.get("sessions") or []
        now = ({kind: float(value) for kind, value in gauges}, sum(int(row["tokens_held"]) for row in sessions))
        if now == before and now[0] and now[1] >= at_least:
            return now
        before = now
    raise RequestFailed(f"/metrics gives cache bytes {before[0]}, /v1/sessions {before[1]} tokens of {at_least}")
