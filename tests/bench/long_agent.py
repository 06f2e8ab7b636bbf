"""Whether an agent still calls its tools by name and knows its system message when its session has rotated.

    python -m tests.bench.long_agent [--turns 40] [--agents 2] [--max-size 2048] [--pin-share 0.5 0]

An agent has a system message with facts, and tools whose names the user does not say. In turn it is asked to call one
of them, and for a fact that was not asked for before. The conversation goes on with the right call, its result and the
right answer, so that a small model's mistake does not teach the next one. Real servers with the bundled model for
tests, one for each share that may be pinned; greedy answers, no grammar, fixed seeds. A turn counts as rotated if the
header of its answer says that tokens were dropped.
"""

import argparse
import json
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai.types.chat import ChatCompletionMessage

from tests.serving.launch import Server, running

TOOLS = {
    "convertHarvest": ("harvest", "lantern"),
    "check_velvet_transfer": ("velvet", "orbit"),
    "play_meadow_quadratic": ("meadow", "tone"),
    "getCitadel": ("citadel", "bridge"),
    "book_marble_voyage": ("marble", "pilot"),
}
"""Name, what it is about, and its argument."""
VALUES = ("Oslo", "Lisbon", "4471", "Friday", "north", "Marble", "Harbour", "17")
PLACES = (
    "Concordat", "Lisbon", "Tarkovsky", "Midland", "Bissau", "Saxony", "Bishkek", "Piraeus", "Agamemnon", "Salisbury",
    "Denmark", "Trinidad", "Florence", "Kingston", "Montana", "Geneva", "Bristol", "Havana", "Madrid", "Norfolk",
)  # fmt: skip
NOTES = (
    "The river runs by the mill and the mill stands by the bridge.",
    "In the evening the boats come back and the boxes are carried up.",
    "Two men counted the barrels, and a third one wrote the numbers down.",
    "The road over the hill is closed until the snow has gone.",
)


@dataclass
class Score:
    """How many turns of a kind were right."""

    right: int = 0
    n: int = 0

    def add(self, right: bool) -> None:
        self.right, self.n = self.right + right, self.n + 1


@dataclass
class Agent:
    """One conversation. `scores` are by kind (`tool` or `fact`) and by whether the session had rotated."""

    server: Server
    seed: int
    scores: dict[tuple[str, bool], Score] = field(default_factory=dict)
    dropped: int = 0
    """Tokens that the last answer did not see."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._client = self.server.client()
        self._facts = {place: str(self._random.randint(1_000_000, 9_999_999)) for place in PLACES}
        facts = " ".join(f"The hidden number linked to {place} is {number}." for place, number in self._facts.items())
        self._messages: list[Any] = [{"role": "system", "content": facts}]
        self._tools: list[Any] = [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": f"Use this for the {thing}.",
                    "parameters": {
                        "type": "object",
                        "properties": {argument: {"type": "string", "description": f"the {argument} of the {thing}"}},
                        "required": [argument],
                    },
                },
            }
            for name, (thing, argument) in TOOLS.items()
        ]

    def play(self, n_turns: int) -> None:
        places = self._random.sample(PLACES, len(PLACES))
        for turn in range(n_turns):
            if turn % 2 == 0:
                self._call_a_tool(turn)
            else:
                self._recall_a_fact(places[turn // 2 % len(places)])

    def _call_a_tool(self, turn: int) -> None:
        name, value = self._random.choice(list(TOOLS)), self._random.choice(VALUES)
        verb, (thing, argument) = re.split("[_A-Z]", name)[0], TOOLS[name]
        answer, rotated = self._ask(f"Can you {verb} the {thing}, using {value} as the {argument}.")
        written = answer.content or "".join(
            call.function.name for call in answer.tool_calls or [] if call.type == "function"
        )
        self._score("tool", rotated, bool(re.search(rf"\b{name}\b", written)))
        call = {"name": name, "arguments": json.dumps({argument: value})}
        self._messages += [
            {"role": "assistant", "tool_calls": [{"id": f"call-{turn}", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": f"call-{turn}", "content": " ".join(self._random.choices(NOTES, k=4))},
            {"role": "assistant", "content": "Done."},
        ]

    def _recall_a_fact(self, place: str) -> None:
        answer, rotated = self._ask(f"Please give me the hidden number of {place}.")
        self._score("fact", rotated, self._facts[place] in (answer.content or ""))
        self._messages.append(
            {"role": "assistant", "content": f"The hidden number for {place} is {self._facts[place]}."}
        )

    def _ask(self, text: str) -> tuple[ChatCompletionMessage, bool]:
        """The answer, and whether it did not see all of the conversation."""
        self._messages.append({"role": "user", "content": text})
        raw = self._client.chat.completions.with_raw_response.create(
            model="default",
            messages=self._messages,
            tools=self._tools,
            temperature=0,
            max_tokens=24,
            extra_body={"prompt_cache_key": f"agent-{self.seed}"},
        )
        self.dropped = int(raw.headers.get("x-turbocache-dropped-tokens", 0))
        return raw.parse().choices[0].message, self.dropped > 0

    def _score(self, kind: str, rotated: bool, right: bool) -> None:
        self.scores.setdefault((kind, rotated), Score()).add(right)


def row(share: float, agents: Sequence[Agent]) -> str:
    """A line of the table."""
    cells = []
    for kind in ("tool", "fact"):
        for rotated in (False, True):
            found = [agent.scores.get((kind, rotated), Score()) for agent in agents]
            cells.append(f"{sum(s.right for s in found)} of {sum(s.n for s in found)}")
    return f"| {share:g} | {' | '.join(cells)} | {max(agent.dropped for agent in agents)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.long_agent", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--turns", type=int, default=40, help="turns of each agent (default: 40)")
    parser.add_argument("--agents", type=int, default=2, help="agents, one after the other (default: 2)")
    parser.add_argument("--max-size", type=int, default=2048, help="tokens of a session (default: 2048)")
    parser.add_argument("--pin-share", type=float, nargs="+", default=[0.5, 0.0], help="shares (default: 0.5 0)")
    options = parser.parse_args()
    print(
        "| share | tool, before | tool, rotated | fact, before | fact, rotated | dropped |\n|---|---|---|---|---|---|"
    )
    for share in options.pin_share:
        with (
            tempfile.TemporaryDirectory() as folder,
            running(Path(folder), MAX_SIZE=str(options.max_size), PIN_SHARE=str(share)) as server,
        ):
            agents = [Agent(server, seed) for seed in range(options.agents)]
            for agent in agents:
                agent.play(options.turns)
            print(row(share, agents), flush=True)


if __name__ == "__main__":
    main()
