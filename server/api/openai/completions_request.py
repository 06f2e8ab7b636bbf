"""The body of POST /v1/completions: fields of OpenAI's older API, and some of other local servers."""

from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag, model_validator

from server.api.openai.sampling import SampledRequest
from server.errors import InvalidRequest, UnsupportedField
from server.http.wire import Condition, NonEmpty, TokenId, given, is_true, only

MOST_ANSWERS = 128
DEFAULT_TOKENS = 16

_Tokens = Annotated[list[TokenId], Field(min_length=1)]


def _kind(prompt: Any) -> str | None:
    """The first item tells the kind of a list."""
    if not isinstance(prompt, list):
        return "<string>" if isinstance(prompt, str) else None
    first = prompt[0] if prompt else 0
    return "<strings>" if isinstance(first, str) else "<token_lists>" if isinstance(first, list) else "<tokens>"


TextPrompt = Annotated[
    Annotated[NonEmpty, Tag("<string>")]
    | Annotated[list[NonEmpty], Field(min_length=1, max_length=MOST_ANSWERS), Tag("<strings>")]
    | Annotated[_Tokens, Tag("<tokens>")]
    | Annotated[list[_Tokens], Field(min_length=1, max_length=MOST_ANSWERS), Tag("<token_lists>")],
    Discriminator(
        _kind,
        custom_error_type="prompt_type",
        custom_error_message="expected one of a string, array of strings, array of integers or array of arrays",
    ),
]


class CompletionRequest(SampledRequest):
    """The body of POST /v1/completions. Null is the same as absent."""

    conditions: ClassVar[tuple[Condition, ...]] = ({"not": {"allOf": [is_true("echo"), given("logprobs")]}},)

    prompt: TextPrompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None

    suffix: Annotated[str | None, only()] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "CompletionRequest":
        # Not ValueErrors: pydantic passes these on unchanged, with the field that they name.
        if self.echo and self.logprobs is not None:
            raise UnsupportedField(
                "Unsupported parameter: 'logprobs' is not supported by this version when 'echo' is enabled.",
                param="logprobs",
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise UnsupportedField(
                "Unsupported value: 'best_of' is supported by this version only as the value of 'n'.",
                param="best_of",
                code="unsupported_value",
            )
        if len(self.prompts) * (self.n or 1) > MOST_ANSWERS:
            raise InvalidRequest(
                f"Invalid 'n': {len(self.prompts)} prompts with {self.n} answers each are more than {MOST_ANSWERS} "
                "answers.",
                param="n",
                code="integer_above_max_value",
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each is a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)
