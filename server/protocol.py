"""What the HTTP rooms and the engine say to each other: plain data, no MLX and no FastAPI.

The HTTP side turns a wire request into a `GenerationRequest` and submits it; the engine answers by calling `deliver`
with zero or more `PrefillProgress` and `TextDelta` events and then exactly one terminal event: `Finished` or `Failed`.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "tool_calls"]
ToolChoice = Literal["none", "auto", "required"]
Channel = Literal["content", "reasoning"]
SessionChange = Literal["delete", "fork", "save", "restore"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn: `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 switch a filter off.

    `logit_bias` is added to the logits of token ids. Presence and frequency penalties are taken off the logits of the
    answer's tokens so far; `repetition_penalty` divides those of all earlier tokens, 1 switches it off. `seed` makes
    draws repeat.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template renders: `messages` and `tools` as it takes them, with `options` for it. `go_on`: the answer
    continues the last message, which is the assistant's, instead of beginning one. `opened`: what opens an answer
    follows the messages.

    `thinking` lets the model think or forbids it, where the template has a switch for that. A `reasoning_effort` that
    the template knows nothing of is refused, or passed over if `lenient`.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    thinking: bool | None = None
    lenient: bool = False
    go_on: bool = False
    opened: bool = True


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments, None for any object.
    `strict`: calls must satisfy it. `param` is where in the request the schema stands.
    """

    name: str
    parameters: dict[str, Any] | None = None
    strict: bool = False
    param: str = "tools"

    @property
    def template(self) -> dict[str, Any]:
        """As parsers and most templates take it, without its description."""
        return {"type": "function", "function": {"name": self.name, "parameters": self.parameters or {}}}


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """What an answer may be. Without rules it is text.

    With `choice` "none" no tool is called, with "auto" the model decides, with "required" the answer is a call, or with
    `parallel` several. Only tools in `allowed` are called, None for all. `schema` is the JSON schema that the content
    must satisfy; `param` is where in the request it stands. `raw`: the answer goes on with the prompt's text, so that
    no mark in it means anything and its leading space belongs to it.
    """

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = "auto"
    allowed: frozenset[str] | None = None
    parallel: bool = True
    schema: dict[str, Any] | None = None
    param: str = "response_format"
    raw: bool = False

    @property
    def calls(self) -> bool:
        """Whether the answer may hold calls."""
        return bool(self.tools) and self.choice != "none"


@dataclass(frozen=True, slots=True)
class Grammar:
    """Rules of an answer, made by the engine. `source` is its text, for llguidance."""

    source: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation or a text as token ids (never empty). `system_end` and `messages_end` are numbers of tokens: what
    a system message begins, and all messages without the answer's opening; later conversations often leave each other
    there. 0 where that is not known. `tool`: the last message is a tool's result, so the turn that a user began goes
    on. `begun`: the answer goes on with the text at the prompt's end, and a space that it begins with belongs to it.
    `param` is where in the request the prompt stands.
    """

    tokens: Sequence[int]
    system_end: int = 0
    messages_end: int = 0
    tool: bool = False
    begun: bool = False
    param: str = "messages"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One answer to be given, its prompt tokenised.

    `prompt` is the whole conversation. `max_tokens` is None for "as far as the model's positions reach". `session` is
    the client's name for the conversation, None for an unnamed one. Sessions of one `owner` are nobody else's.
    `arrived` is a time as `time.time` gives it. `logprobs` asks for the tokens with so many alternatives each, None for
    none. `rules` say how calls are read, and `grammar` holds the answer to them, None where nothing must. `choice` is
    the answer's place among several of one HTTP request; all its events carry it. `beside` is the id of a request with
    the same prompt: this one waits until that has been read, starts from there, and leaves no session behind.
    """

    request_id: str
    prompt: Prompt
    max_tokens: int | None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    session: str | None = None
    owner: str = ""
    logprobs: int | None = None
    rules: AnswerRules = field(default_factory=AnswerRules)
    grammar: Grammar | None = None
    choice: int = 0
    beside: str | None = None
    arrived: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one turn. `cached_tokens` of the prompt were found in the session's cache, the rest prefilled;
    `reasoning_tokens` of the completion are of a thought.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """`processed` of `total` new prompt tokens are in the cache. The first one, with none, says that it has begun."""

    processed: int
    total: int
    choice: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, as bytes because one may be half a character, and the natural logarithm of its probability."""

    token: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class DrawnToken(TokenLogprob):
    """A token of the answer, and the likeliest tokens in its place, best first."""

    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that is safe to send (never half a character, never part of a stop string). `tokens`, where they were asked
    for, are those drawn since the delta before.
    """

    text: str
    channel: Channel = "content"
    tokens: tuple[DrawnToken, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call. `arguments` is JSON text of an object."""

    id: str
    name: str
    arguments: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """Terminal: the answer is complete. `stop` is the stop string that ended it, if one did."""

    finish_reason: FinishReason
    usage: Usage
    stop: str | None = None
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: the request ended with an error; `error` is one of server.errors' classes."""

    error: Exception
    choice: int = 0


Event = PrefillProgress | TextDelta | ToolCall | Finished | Failed
Deliver = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Health:
    """`alive` is False when the engine thread is dead or stuck; `detail` says which and what to do."""

    alive: bool
    detail: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The loaded model as clients see it. A conversation has at most `max_tokens` tokens: the model's own positions, or
    fewer where sessions may not rotate. One that is longer than `rotates_at` has lost its oldest tokens, None: never.
    Token ids are below `n_tokens`.
    """

    id: str
    created: int
    max_tokens: int
    n_tokens: int
    rotates_at: int | None = None


class Engine(Protocol):
    """What the HTTP rooms need of the engine. All methods may be called from the event loop and return at once,
    except `tokenize`, `encode`, `decode`, `spell` and `constrain`, which are called from worker threads and take as
    long as they need."""

    @property
    def model(self) -> ModelInfo: ...

    def tokenize(self, conversation: Conversation) -> Prompt:
        """A conversation through the model's chat template. Raises server.errors.InvalidRequest when that refuses it,
        UnsupportedField for an option that it doesn't know."""
        ...

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Plain text as token ids, with those that the tokenizer puts around a text if `special`."""
        ...

    def decode(self, tokens: Sequence[int], param: str = "tokens") -> str:
        """Token ids as text. `param` is where in the request they stand. Raises server.errors.InvalidRequest for an id
        that the model doesn't have.
        """
        ...

    def spell(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the tokenizer's vocabulary has it. Raises as `decode` does."""
        ...

    def constrain(self, rules: AnswerRules, prompt: Prompt) -> Grammar | None:
        """The grammar that holds an answer to its rules; None where nothing needs to be held.

        Raises server.errors.InvalidRequest for a schema with anything that can't be held to, and UnsupportedField where
        the model's own form of calls can't be.
        """
        ...

    def submit(self, requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        """Queue requests, all or none. `deliver` is called from the engine's thread. Raises server.errors.QueueFull,
        OutOfMemory, ContextLengthExceeded or EngineDead; after a raise nothing was queued."""
        ...

    def cancel(self, request_id: str) -> None:
        """Stop working on a request whose client is gone; it gets no further events. Unknown ids are ignored."""
        ...

    def health(self) -> Health: ...

    def backend(self) -> dict[str, Any]:
        """The JSON of GET /v1/backend: backend, reason, checks, preset, layers, BLAS, memory."""
        ...

    def status(self) -> dict[str, Any]:
        """The JSON of GET /v1/status: requests, memory and pages now."""
        ...

    def sessions(self, owner: str) -> list[dict[str, Any]]:
        """The JSON rows of GET /v1/sessions: what belongs to an owner."""
        ...

    def change_session(
        self, change: SessionChange, owner: str, id: str, new_id: str | None = None
    ) -> Future[dict[str, Any]]:
        """Delete a session, copy it under a name of its own (`new_id`, or one that is made up), write it to disk, or
        bring it back into memory. Returns its JSON row afterwards, a fork's the new one's.

        Raises EngineDead; the future raises server.errors.NotFound, Conflict (it runs, the new name is taken, or its
        file is refused), OutOfMemory, InvalidRequest (there is no disk) or SessionNotSaved.
        """
        ...
