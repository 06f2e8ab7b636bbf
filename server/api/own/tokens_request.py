"""The bodies of POST /tokenize and /detokenize, as vLLM has them."""

from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Field, JsonValue, RootModel, Tag

from server.api.openai.chat_request import Message, template_message
from server.api.openai.tools import ToolSpec
from server.http.wire import ModelName, TokenId, Wire, only
from server.protocol import Conversation


class _TokenizeRequest(Wire):
    model: ModelName | None = None
    return_token_strs: bool | None = None


class TokenizeText(_TokenizeRequest):
    """A text."""

    prompt: str
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its special tokens around the text. The default is true."""


class TokenizeChat(_TokenizeRequest):
    """A conversation. It ends with the beginning of an answer unless `add_generation_prompt` is false."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None

    # The template adds them itself.
    add_special_tokens: Annotated[bool | None, only(False)] = None

    # A field of vLLM.
    continue_final_message: Annotated[bool | None, only(False)] = None

    def conversation(self) -> Conversation:
        """For the chat template."""
        return Conversation(
            [template_message(message) for message in self.messages],
            tools=[tool.template() for tool in self.tools or ()],
            options=dict(self.chat_template_kwargs or {}),
            add_generation_prompt=self.add_generation_prompt is not False,
        )


def _kind(body: Any) -> str | None:
    return ("<chat>" if "messages" in body else "<text>") if isinstance(body, dict) else None


class TokenizeRequest(
    RootModel[
        Annotated[Annotated[TokenizeText, Tag("<text>")] | Annotated[TokenizeChat, Tag("<chat>")], Discriminator(_kind)]
    ]
):
    """The body of POST /tokenize, with `prompt` or `messages`. Null is the same as absent."""


class DetokenizeRequest(Wire):
    """The body of POST /detokenize."""

    model: ModelName | None = None
    tokens: list[TokenId]


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    """The tokens as the vocabulary spells them, null unless requested."""


class Detokenized(BaseModel):
    prompt: str
