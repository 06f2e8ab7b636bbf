"""Fields that chat and text completions share: sampling, stop strings, streaming."""

from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequest
from server.http.session_name import KEY_PATTERN, MAX_LENGTH
from server.http.wire import Condition, ModelName, NonEmpty, Wire, by_kind, given, is_true, needs, of_model, only
from server.protocol import SamplingParams

_USUAL = SamplingParams()
"""OpenAI's and Anthropic's defaults."""


class StreamOptions(Wire):
    """Only with `stream: true`."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, only(False)] = None


def _token_id(text: str) -> str:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise PydanticCustomError("token_id", "Expected a token id")
    return text


TokenKey = Annotated[str, AfterValidator(_token_id), Field(json_schema_extra={"pattern": "^[0-9]{1,9}$"})]
Stop = Annotated[
    Annotated[NonEmpty, Tag("<string>")] | Annotated[list[NonEmpty], Field(max_length=4), Tag("<list>")],
    by_kind("stop_type", (str, "<string>"), (list, "<list>")),
]
SessionKey = Annotated[str, Field(json_schema_extra={"maxLength": MAX_LENGTH, "pattern": KEY_PATTERN})]
AnswerTokens = Annotated[int, Field(ge=1), of_model("answer")]


class Sampling(Wire):
    """A body whose sampling fields have the names of `SamplingParams`."""

    def sampling(self, defaults: SamplingParams = _USUAL) -> SamplingParams:
        """The given values, and the model's `defaults` for the others."""
        given: dict[str, Any] = {field.name: getattr(self, field.name, None) for field in fields(SamplingParams)}
        if (bias := given["logit_bias"]) is not None:
            given["logit_bias"] = tuple(sorted((int(token), value) for token, value in bias.items()))
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})


class SampledRequest(Sampling):
    """Null is the same as absent."""

    conditions: ClassVar[tuple[Condition, ...]] = (needs(given("stream_options"), is_true("stream")),)

    model: ModelName

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: AnswerTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    # Logits are divided by it and must stay in the range of the smallest float formats.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    prompt_cache_key: SessionKey | None = None

    # A label for the client. It does not change the answer.
    user: str | None = None

    @model_validator(mode="after")
    def _stream_agrees(self) -> "SampledRequest":
        # Not a ValueError: pydantic passes this on unchanged, with the field that it names.
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
            )
        return self

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)
