"""The script of an agent's day: twelve conversations, who says what in them, and in which order their turns come.

Everything follows from the seed except the answers, which are the server's. Text is made here, of short sentences and
lists: the bundled model repeats a list when asked to, so that such answers use all the tokens they may.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tests.bench.prompts import WORDS

Kind = Literal["first", "plain", "tool", "edited", "reasoning dropped", "title"]
"""What a request is, seen from the one before it in its conversation:

first              a conversation's first message
plain              the answer comes back as it was given, and the next message follows
tool               the answer comes back with a tool call behind it, and the tool's result follows
edited             the last message that a person wrote is replaced, what followed it is gone
reasoning dropped  the answers since the person's last message come back without their beginning, as a template that
                   drops earlier reasoning makes of them, and the next message follows
title              a side request without a session's name that quotes the conversation's beginning
"""
KINDS: tuple[Kind, ...] = get_args(Kind)

Message = dict[str, Any]

TITLE_TASK = (
    "You are a title generator. You will be shown the beginning of a conversation between a person and an assistant. "
    "Write one short title that helps the person to find this conversation again. The title has at most six words and "
    "stands on a single line. Use the language of the person. Keep names of files, numbers and technical words as they "
    "are. Do not answer the questions in the conversation, do not explain the title, and do not put it in quotes. If "
    "the beginning says nothing, name the task that seems most likely. Never refuse, and never say that you cannot."
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long a day is."""

    turns: int = 9
    sentences: int = 4
    listed: int = 10
    result_lines: int = 12
    answer_tokens: int = 24
    title_tokens: int = 8
    titles_after: tuple[int, ...] = (1, 5)


DAY = Sizes()
QUICK = Sizes(turns=4, sentences=2, listed=8, result_lines=4, answer_tokens=12, title_tokens=4, titles_after=(1,))


@dataclass(frozen=True, slots=True)
class Agent:
    """A program that talks to the server: its system message and whether its model thinks before it answers."""

    name: str
    task: str
    tools: tuple[tuple[str, str, str], ...]
    reasons: bool = False

    @property
    def system(self) -> str | None:
        """The system message, with the tools described as text; None for an agent that sends none."""
        if not self.task:
            return None
        lines = [self.task, "", "Tools:"]
        for name, argument, about in self.tools:
            schema = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
            lines.append(f"- {name}: {about} Parameters: {json.dumps(schema)}")
        lines += ["", "Use a tool when you do not know something. Keep answers short. Never invent results."]
        return "\n".join(lines)


CODER = Agent(
    "coder",
    "You are a coding agent. You work in one folder, read before you write, and run the tests after every change.",
    (
        ("read_file", "path", "Gives the text of a file."),
        ("write_file", "path", "Replaces the text of a file; ask before you use it."),
        ("list_files", "folder", "Lists the files of a folder with their sizes."),
        ("search", "pattern", "Finds a pattern in all files and gives the lines around it."),
        ("run_tests", "name", "Runs the tests whose names contain the given text."),
        ("show_changes", "since", "Shows what has changed since a version."),
    ),
)
CLERK = Agent(
    "clerk",
    "You are an office agent. You look after letters, dates and lists for one person, and you check dates twice.",
    (
        ("find_letter", "words", "Finds letters that contain the given words."),
        ("read_letter", "number", "Gives the text of a letter."),
        ("calendar", "day", "Lists what is planned on a day."),
        ("plan", "entry", "Puts an entry into the calendar; ask before you use it."),
        ("address", "person", "Gives a person's address."),
        ("add_to_list", "item", "Puts an item on the list for tomorrow."),
    ),
)
PLANNER = Agent(
    "planner",
    "You are a planning agent. You think step by step about journeys and stores, then answer in one sentence.",
    (
        ("timetable", "place", "Lists departures from a place."),
        ("distance", "places", "Gives the distance between two places."),
        ("stock", "item", "Says how many of an item are in store."),
        ("weather", "place", "Gives the weather of the next three days."),
        ("price", "item", "Gives the price of an item."),
        ("reserve", "what", "Reserves a seat or an item; ask before you use it."),
    ),
    reasons=True,
)
CHAT = Agent("chat", "", ())

AGENTS = (CODER, CLERK, PLANNER, CODER, CLERK, PLANNER, CODER, CLERK, PLANNER, PLANNER, CHAT, CHAT)
"""The agent of each of the twelve conversations."""


@dataclass(slots=True)
class Conversation:
    """One conversation as its client keeps it: the messages so far, the last answer included."""

    name: str
    agent: Agent
    sizes: Sizes
    draw: random.Random
    messages: list[Message] = field(default_factory=list)

    def kinds(self) -> list[Kind]:
        """The kinds of its turns, in order: of those after the first an eighth are edits, three are tool results."""
        rest = self.sizes.turns - 1
        edited = max(1, round(rest / 8))
        tool = round(rest * 3 / 8) if self.agent.tools else 0
        other: Kind = "reasoning dropped" if self.agent.reasons else "plain"
        counts: dict[Kind, int] = {"edited": edited, "tool": tool, other: rest - edited - tool}
        later = [kind for kind, count in counts.items() for _ in range(count)]
        self.draw.shuffle(later)
        return ["first", *later]

    def turn(self, kind: Kind) -> list[Message]:
        """The messages that the client sends next; `answered` takes what comes back."""
        if kind == "tool":
            self._use_tool()
        elif kind == "edited":
            self._edit()
        else:
            if kind == "reasoning dropped":
                self._drop_reasoning()
            if kind == "first" and self.agent.system is not None:
                self.messages.append({"role": "system", "content": self.agent.system})
            self.messages.append({"role": "user", "content": self._text()})
        return list(self.messages)

    def answered(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    def title(self) -> list[Message]:
        """A side request for a title: what was said so far, 600 characters of it at most."""
        said = [f"{m['role']}: {m['content']}" for m in self.messages if m["role"] in ("user", "assistant")]
        quoted = "\n".join(said)[:600]
        return [
            {"role": "system", "content": TITLE_TASK},
            {"role": "user", "content": f"Give a title for this conversation:\n\n{quoted}"},
        ]

    def _use_tool(self) -> None:
        name, argument, _ = self.draw.choice(self.agent.tools)
        call = f"call_{self.draw.randrange(10**8):08d}"
        function = {"name": name, "arguments": json.dumps({argument: self.draw.choice(WORDS)})}
        self.messages[-1] = {
            **self.messages[-1],
            "tool_calls": [{"id": call, "type": "function", "function": function}],
        }
        lines = (f"{n}: {self._sentence()}" for n in range(1, self.sizes.result_lines + 1))
        self.messages.append({"role": "tool", "tool_call_id": call, "content": "\n".join(lines)})

    def _edit(self) -> None:
        """Another end to the person's last message: none, the first third or two thirds of its words stay."""
        last = self._last_user()
        words = self.messages[last]["content"].split(" ")
        kept = words[: len(words) * self.draw.randrange(3) // 3]
        self.messages[last:] = [{"role": "user", "content": " ".join([*kept, self._text()])}]

    def _drop_reasoning(self) -> None:
        """Keeps the second half of each answer's words; of an answer of one word "Done." remains."""
        for index in range(self._last_user() + 1, len(self.messages)):
            message = self.messages[index]
            if message["role"] == "assistant":
                words = message["content"].split(" ")
                self.messages[index] = {**message, "content": " ".join(words[(len(words) + 1) // 2 :]) or "Done."}

    def _last_user(self) -> int:
        return max(index for index, message in enumerate(self.messages) if message["role"] == "user")

    def _text(self) -> str:
        said = " ".join(self._sentence() for _ in range(self.sizes.sentences))
        listed = ", ".join(self.draw.choice(WORDS) for _ in range(self.sizes.listed))
        return f"{said} Here is a list:\n{listed}\nRepeat the list."

    def _sentence(self) -> str:
        one, two, three = (self.draw.choice(WORDS) for _ in range(3))
        deed = self.draw.choice(("stands near", "belongs to", "was moved to", "is older than", "was paid for with"))
        return f"Number {self.draw.randrange(10, 100)}, the {one} {deed} the {two} of the {three}."


@dataclass(frozen=True, slots=True)
class Step:
    """One request of the day: turn `turn` (from 1) of a conversation, or its title after that turn."""

    conversation: Conversation
    turn: int
    kind: Kind

    def send(self) -> list[Message]:
        """The request's messages. Call it once, when the step's time has come: it makes the turn."""
        return self.conversation.title() if self.kind == "title" else self.conversation.turn(self.kind)


def day(sizes: Sizes, seed: int = 0) -> Iterator[Step]:
    """The day's requests. Each must be answered (`Conversation.answered`, titles apart) before the next is taken."""
    order = random.Random(seed)
    conversations = [
        Conversation(f"{agent.name}-{index}", agent, sizes, random.Random(f"{seed} {index}"))
        for index, agent in enumerate(AGENTS)
    ]
    kinds = [conversation.kinds() for conversation in conversations]
    places = [index for index in range(len(AGENTS)) for _ in range(sizes.turns)]
    order.shuffle(places)
    done = [0] * len(AGENTS)
    for index in places:
        kind = kinds[index][done[index]]
        done[index] += 1
        yield Step(conversations[index], done[index], kind)
        if done[index] in sizes.titles_after:
            yield Step(conversations[index], done[index], "title")
