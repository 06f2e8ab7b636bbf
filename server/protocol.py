"""The interface between the HTTP side and the engine: plain data, no MLX and no FastAPI.

The HTTP side turns a wire request into a `GenerationRequest` and submits it. The engine answers by calling `deliver`
with any number of `PrefillProgress`, `TextDelta` and `ToolCall` events and then exactly one terminal event: `Finished`
or `Failed`.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from server.errors import ContextLengthExceeded
from turbocache.cache.outline import PLAIN, Outline

FinishReason = Literal["stop", "length", "tool_calls"]
ToolChoice = Literal["none", "auto", "required"]
Channel = Literal["content", "reasoning"]
SessionChange = Literal["delete", "fork", "save", "restore"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. The defaults of all fields but `temperature` switch them off."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has so far."""
    frequency_penalty: float = 0.0
    """The same, times the token's count in the answer."""
    repetition_penalty: float = 1.0
    """Divides the logits of all earlier tokens, the prompt's too."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids with what is added to their logits."""
    seed: int | None = None
    """Makes draws repeat."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The input of a chat template."""

    messages: list[dict[str, Any]]
    """Contents are strings, and no role is `developer`."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """Variables for the template."""
    reasoning_effort: str | None = None
    thinking: bool | None = None
    """Whether the model may think, for templates that have a switch."""
    ignore_unknown_effort: bool = False
    """Ignore a `reasoning_effort` that the template doesn't know, instead of refusing it."""
    continue_final_message: bool = False
    """The answer continues the last message, which is the assistant's."""
    add_generation_prompt: bool = True
    """Whether the opening of an answer follows the messages."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments. None allows any object."""
    strict: bool = False
    """Calls must satisfy the schema."""
    param: str = "tools"
    """Where in the request the schema stands."""

    @property
    def template(self) -> dict[str, Any]:
        """The form that parsers and most templates take, without a description."""
        return {"type": "function", "function": {"name": self.name, "parameters": self.parameters or {}}}


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """What an answer may be. Without rules it is text."""

    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    """none: no tool is called. auto: the model decides. required: the answer is a call."""
    allowed_tools: frozenset[str] | None = None
    """The names that may be called. None allows all."""
    parallel: bool = True
    """The answer may have several calls."""
    schema: dict[str, Any] | None = None
    """JSON schema that the content must satisfy."""
    param: str = "response_format"
    """Where in the request the schema stands."""
    raw: bool = False
    """The answer continues plain text: it has no marks of thoughts or calls, and its leading space belongs to it."""

    @property
    def calls(self) -> bool:
        """Whether the answer may have calls."""
        return bool(self.tools) and self.tool_choice != "none"


@dataclass(frozen=True, slots=True)
class Grammar:
    """The engine's grammar for an answer."""

    source: str
    """Text for llguidance."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation or a text as token ids. Later conversations often diverge at `system_end` or `messages_end`."""

    tokens: Sequence[int]
    """Never empty."""
    system_end: int = 0
    """Number of tokens up to the end of the system message. 0 if unknown."""
    messages_end: int = 0
    """Number of tokens up to the end of the messages, before the opening of the answer. 0 if unknown."""
    after_tool_result: bool = False
    """The last message is a tool's result, so the user's turn continues."""
    continued: bool = False
    """The answer continues the text at the prompt's end, so its leading space belongs to it."""
    opening: str = "normal"
    """State of the text in which the answer begins: `reasoning` inside a thought."""
    param: str = "messages"
    """Where in the request the prompt stands."""
    outline: Outline = PLAIN
    """Where the prefix ends and turns begin, if sessions rotate."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One answer to generate."""

    request_id: str
    prompt: Prompt
    """The whole conversation."""
    max_tokens: int | None
    """None: up to the model's last position."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    session: str | None = None
    """The client's name for the conversation, if it gave one."""
    owner: str = ""
    """Requests of one owner never see another owner's sessions."""
    logprobs: int | None = None
    """Number of alternatives to report for each token. None reports no tokens."""
    rules: AnswerRules = field(default_factory=AnswerRules)
    grammar: Grammar | None = None
    """Holds the answer to its rules, where something must be held."""
    choice: int = 0
    """Index of the answer among those of one HTTP request. All its events carry it."""
    shares_prompt_of: str | None = None
    """Id of a request with the same prompt. This one waits for that prefill, starts from it and leaves no session."""
    arrived: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one turn."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens found in the cache. The others were prefilled."""
    completion_tokens: int
    reasoning_tokens: int = 0
    """Completion tokens that belong to a thought."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """What of a conversation is no longer in its session's cache."""

    tokens: int = 0
    turns: int = 0
    """The user's turns that these tokens belong to."""


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """`processed` of `total` new prompt tokens are in the cache. The first event has 0: the prefill begins."""

    processed: int
    total: int
    choice: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: bytes
    """Bytes, because a token may be a part of a character."""
    logprob: float
    """Natural logarithm of the probability."""


@dataclass(frozen=True, slots=True)
class DrawnToken(TokenLogprob):
    """A token of the answer."""

    top: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens in its place, best first."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that is safe to send: never a part of a character or of a stop string."""

    text: str
    channel: Channel = "content"
    tokens: tuple[DrawnToken, ...] = ()
    """The tokens drawn since the delta before, if the request asked for them."""
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call."""

    id: str
    name: str
    arguments: str
    """JSON text of an object."""
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """Terminal event: the answer is complete."""

    finish_reason: FinishReason
    usage: Usage
    stop: str | None = None
    """The stop string that ended the answer, if one did."""
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal event: the request ended with an error."""

    error: Exception
    """A `server.errors.ServerError`."""
    choice: int = 0


Event = PrefillProgress | TextDelta | ToolCall | Finished | Failed
Deliver = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Health:
    alive: bool
    """False when the engine's thread is dead or stuck."""
    detail: str
    """What is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The loaded model as clients see it."""

    id: str
    created: int
    max_tokens: int
    """Longest conversation that is accepted: the model's positions, or fewer where sessions may not rotate."""
    n_tokens: int
    """Size of the vocabulary. Token ids are below it."""
    rotates_at: int | None = None
    """A longer conversation loses its oldest tokens. None: sessions never rotate."""
    license: str | None = None
    """From the model's card, like `origin`. None: not known."""
    origin: str | None = None
    sampling: SamplingParams = SamplingParams()
    """What a request gets where it says nothing."""

    def answer_limit(self, n_prompt: int, max_tokens: int | None, param: str) -> int:
        """Most tokens that the answer may have. Raises ContextLengthExceeded, also when not one new token fits."""
        if n_prompt + (max_tokens or 1) > self.max_tokens:
            raise ContextLengthExceeded(
                limit=self.max_tokens, prompt_tokens=n_prompt, max_tokens=max_tokens, param=param
            )
        return max_tokens or self.max_tokens - n_prompt


class Engine(Protocol):
    """What the HTTP side needs from the engine.

    All methods may be called from the event loop and return at once, except `tokenize`, `encode`, `decode`,
    `token_strings` and `constrain`. Those are called from worker threads and may take long.
    """

    @property
    def model(self) -> ModelInfo: ...

    def tokenize(self, conversation: Conversation) -> Prompt:
        """Apply the model's chat template.

        Raises server.errors.InvalidRequest when the template refuses the conversation, UnsupportedField for an option
        that it doesn't know.
        """
        ...

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Plain text as token ids. `special` adds the tokens that the tokenizer puts around a text."""
        ...

    def decode(self, tokens: Sequence[int], param: str = "tokens") -> str:
        """Token ids as text. `param` is where they stand in the request.

        Raises server.errors.InvalidRequest for an id that the model doesn't have.
        """
        ...

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the tokenizer's vocabulary spells it. Raises as `decode` does."""
        ...

    def constrain(self, rules: AnswerRules, prompt: Prompt) -> Grammar | None:
        """The grammar that holds an answer to its rules, or None where no rule needs one.

        Raises server.errors.InvalidRequest for a schema that a grammar can't enforce, and UnsupportedField if the
        model's format of calls can't be enforced.
        """
        ...

    def submit(self, requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        """Queue all requests or none. The engine's thread calls `deliver`.

        Raises server.errors.QueueFull, OutOfMemory, ContextLengthExceeded or EngineDead. Then nothing is queued.
        """
        ...

    def dropped(self, prompt: Prompt) -> Dropped:
        """What of a prompt its answer will not see, because the session rotates."""
        ...

    def cancel(self, request_id: str) -> None:
        """Stop a request whose client is gone. It gets no further events. Unknown ids are ignored."""
        ...

    def health(self) -> Health: ...

    def backend(self) -> dict[str, Any]:
        """The JSON of GET /v1/backend: backend, reason, checks, preset, layers, BLAS, memory."""
        ...

    def status(self) -> dict[str, Any]:
        """The JSON of GET /v1/status: requests, memory and pages now."""
        ...

    def sessions(self, owner: str) -> list[dict[str, Any]]:
        """The JSON rows of GET /v1/sessions for an owner."""
        ...

    def change_session(
        self, change: SessionChange, owner: str, id: str, new_id: str | None = None
    ) -> Future[dict[str, Any]]:
        """Delete, fork, save (to disk) or restore (to memory) a session. A fork without `new_id` gets a made-up id.

        Returns the session's JSON row after the change; of a fork, the new session's. Raises EngineDead. The future
        raises server.errors.NotFound, Conflict (the session runs, the new id is taken, or its file is refused),
        OutOfMemory, InvalidRequest (there is no disk) or SessionNotSaved.
        """
        ...
