"""POST /tokenize and /detokenize, as vLLM has them."""

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from server.api.own.tokens_request import (
    Detokenized,
    DetokenizeRequest,
    TokenizeChat,
    Tokenized,
    TokenizeRequest,
    TokenizeText,
)
from server.errors import NotFound
from server.http.generation import until_disconnect
from server.http.middleware import app_context
from server.http.respond import check_model, json_response
from server.http.routing import api_router, raises
from server.protocol import Engine

router = api_router()


@router.post("/tokenize", response_model=Tokenized, responses=raises(NotFound))
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The token ids of a text, or of a conversation in the model's chat template."""
    engine, wanted = app_context(request).engine, body.root
    _check_name(engine, wanted.model)

    def work() -> Tokenized:
        tokens = _tokens(engine, wanted)
        strings = engine.token_strings(tokens) if wanted.return_token_strs else None
        return Tokenized(
            count=len(tokens), max_model_len=engine.model.max_tokens, tokens=list(tokens), token_strs=strings
        )

    tokenized = await until_disconnect(asyncio.to_thread(work), request.receive)
    return json_response(tokenized)


@router.post("/detokenize", response_model=Detokenized, responses=raises(NotFound))
async def detokenize(request: Request, wanted: DetokenizeRequest) -> Response:
    """The text of token ids."""
    engine = app_context(request).engine
    _check_name(engine, wanted.model)
    text = await until_disconnect(asyncio.to_thread(engine.decode, wanted.tokens), request.receive)
    return json_response(Detokenized(prompt=text))


def _tokens(engine: Engine, wanted: TokenizeText | TokenizeChat) -> Sequence[int]:
    if isinstance(wanted, TokenizeText):
        return engine.encode(wanted.prompt, wanted.add_special_tokens is not False)
    return engine.tokenize(wanted.conversation()).tokens


def _check_name(engine: Engine, name: str | None) -> None:
    """The model is optional in these bodies."""
    if name is not None:
        check_model(name, engine.model)
