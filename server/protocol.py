"""What the HTTP rooms and the engine say to each other: plain data, no MLX and no FastAPI.

The HTTP side turns a wire request into a `GenerationRequest` and submits it; the engine answers by calling `deliver`
with zero or more `PrefillProgress` and `TextDelta` events and then exactly one terminal event: `Finished` or `Failed`.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]
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
class Prompt:
    """A conversation as token ids (never empty). `system_end` and `messages_end` are numbers of tokens: what a system
    message begins, and all messages without the answer's opening; later conversations often leave each other there. 0
    where that is not known. `tool`: the last message is a tool's result, so the turn that a user began goes on.
    """

    tokens: Sequence[int]
    system_end: int = 0
    messages_end: int = 0
    tool: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One accepted chat turn, tokenised.

    `prompt` is the whole conversation. `max_tokens` is None for "as far as the model's
    positions reach". `session` is the client's name for the conversation, None for an unnamed one. Sessions of one
    `owner` are nobody else's. `arrived` is a time as `time.time` gives it. `logprobs` asks for the tokens with so many
    alternatives each, None for none.
    """

    request_id: str
    prompt: Prompt
    max_tokens: int | None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    session: str | None = None
    owner: str = ""
    logprobs: int | None = None
    arrived: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one turn. `cached_tokens` of the prompt were found in the session's cache, the rest prefilled."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """`processed` of `total` new prompt tokens are in the cache."""

    processed: int
    total: int


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


@dataclass(frozen=True, slots=True)
class Finished:
    """Terminal: the answer is complete."""

    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: the request ended with an error; `error` is one of server.errors' classes."""

    error: Exception


Event = PrefillProgress | TextDelta | Finished | Failed
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
    """

    id: str
    created: int
    max_tokens: int
    rotates_at: int | None = None


class Engine(Protocol):
    """What the HTTP rooms need of the engine. All methods may be called from the event loop and return at once,
    except `tokenize`, which may be called from any worker thread and takes as long as the template needs."""

    @property
    def model(self) -> ModelInfo: ...

    def tokenize(self, messages: list[dict[str, Any]]) -> Prompt:
        """Messages through the model's chat template. Raises server.errors.InvalidRequest when the template refuses."""
        ...

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Queue a request. `deliver` is called from the engine's thread. Raises server.errors.QueueFull,
        OutOfMemory, ContextLengthExceeded or EngineDead; after a raise nothing was queued."""
        ...

    def cancel(self, request_id: str) -> None:
        """Stop working on a request whose client is gone; it gets no further events. Unknown ids are ignored."""
        ...

    def health(self) -> Health: ...

    def backend(self) -> dict[str, Any]:
        """The JSON of GET /v1/backend: backend, reason, checks, preset, layers, BLAS, memory."""
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
