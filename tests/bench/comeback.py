"""How long a conversation's next turn waits for its first token: cold, warm, and brought back from disk.

    python -m tests.bench.comeback [--tokens 6000] [--repeat 3] [--json OUT]

One real server with its default settings. Each repetition is a conversation of its own: a cold turn (time to first
token of a prompt of `--tokens` tokens), a warm turn on top of it, and, after the server was stopped and started, a turn
on what the disk has. The second turns are of equal length, some 20 new tokens. Before each restored turn the server
answers something else, so that no turn pays for the start.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tests.bench.client import Answer, Endpoint, Message
from tests.bench.prompts import assistant, reading, tokens_per_word, user
from tests.bench.report import Row, Target
from tests.serving.launch import Server, running

WARM, RESTORED = Target("at most", 0.15), Target("at most", 0.25)


def endpoint_of(server: Server) -> Endpoint:
    return Endpoint(int(server.url.rsplit(":", 1)[1]), {"model": "default"}, names_sessions=True)


def checked(answer: Answer, cached: bool, n_tokens: int) -> Answer:
    """Raises RuntimeError when a turn was not what it is measured as."""
    fresh = answer.prompt_tokens - answer.cached_tokens
    if answer.prompt_tokens < n_tokens * 0.9 or (fresh > 64 if cached else answer.cached_tokens > 64):
        raise RuntimeError(f"{answer.cached_tokens} of {answer.prompt_tokens} tokens were cached")
    return answer


def measure(n_tokens: int, repeat: int) -> dict[str, list[float]]:
    """Seconds to the first token, one of each kind for each repetition."""
    found: dict[str, list[float]] = {"cold": [], "warm": [], "restored": []}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        talks: list[list[Message]] = []
        with running(place, SESSION_DIR=str(place / "sessions")) as server:
            endpoint = endpoint_of(server)
            n_words = round(n_tokens / tokens_per_word(endpoint))
            for i in range(repeat):
                talk = reading(f"text {i}", n_words)
                cold = checked(endpoint.chat(talk, 8, f"talk-{i}"), False, n_tokens)
                talk += [assistant(cold.text), user("What is the first word of the text?")]
                warm = checked(endpoint.chat(talk, 8, f"talk-{i}"), True, n_tokens)
                talks.append([*talk, assistant(warm.text), user("What is the second word of the text?")])
                found["cold"].append(cold.ttft)
                found["warm"].append(warm.ttft)
        with running(place, SESSION_DIR=str(place / "sessions")) as server:
            endpoint = endpoint_of(server)
            for i, talk in enumerate(talks):
                endpoint.chat([user("Hello!")], 8)
                found["restored"].append(checked(endpoint.chat(talk, 8, f"talk-{i}"), True, n_tokens).ttft)
            if server.metric("restores_total") != repeat:
                raise RuntimeError("not every session came back from disk")
    return found


def row(found: dict[str, list[float]], kind: str, target: Target) -> Row:
    return Row(kind, "s", 3, False, list(zip(found[kind], found["cold"], strict=True)), target, "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.tokens, options.repeat)
    rows = [row(found, "warm", WARM), row(found, "restored", RESTORED)]
    print(f"| {options.tokens} tokens, {options.repeat} conversations (medians) | s | of cold | must | |")
    print("| --- | ---: | ---: | ---: | --- |")
    print(f"| cold turn | {statistics.median(found['cold']):.3f} | 1 | | |")
    met = [one.target is not None and one.target.met(one.ratio) for one in rows]
    for one, passed in zip(rows, met, strict=True):
        seconds = statistics.median(ours for ours, _ in one.pairs)
        print(f"| {one.name} turn | {seconds:.3f} | {one.ratio:.3f} | {one.target} | {'pass' if passed else 'miss'} |")
    if options.json:
        options.json.write_text(json.dumps({"tokens": options.tokens, "seconds": found}, indent=1) + "\n")
    return int(not all(met))


if __name__ == "__main__":
    raise SystemExit(main())
