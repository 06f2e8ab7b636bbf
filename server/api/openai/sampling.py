"""Fields that chat and text completions share: sampling, stop strings, streaming."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequest
from server.http.session_name import KEY_PATTERN, MAX_LENGTH
from server.http.wire import Condition, ModelName, NonEmpty, Wire, given, is_true, kind_of, needs, of_model, only
from server.protocol import SamplingParams


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
    Discriminator(
        kind_of((str, "<string>"), (list, "<list>")),
        custom_error_type="stop_type",
        custom_error_message="expected one of a string or array of strings",
    ),
]
SessionKey = Annotated[str, Field(json_schema_extra={"maxLength": MAX_LENGTH, "pattern": KEY_PATTERN})]
AnswerTokens = Annotated[int, Field(ge=1), of_model("answer")]


class SampledRequest(Wire):
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

    def sampling(self) -> SamplingParams:
        """The given values, or OpenAI's defaults."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple(sorted((int(token), bias) for token, bias in (self.logit_bias or {}).items())),
            seed=self.seed,
        )
