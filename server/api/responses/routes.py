"""/v1/responses: OpenAI's Responses API. The server remembers the conversations.

The KV session of a conversation has the client's name for it, else the id of its first response. A client that sends
the whole history remembers it itself. Then there is no name, and the request continues the session that its prompt
extends, as in chats.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from server.api.responses.answer import DeletedResponse, InputTokens, ItemList, ResponseBody, ResponseEvent
from server.api.responses.input import ItemReference
from server.api.responses.items import Item, messages_of
from server.api.responses.renderer import ResponseRenderer
from server.api.responses.request import InputTokensRequest, ResponseInput, ResponsesRequest
from server.api.responses.store import ResponseStore, StoredResponse, store_of
from server.errors import ContextLengthExceeded, InvalidRequest, NotFound
from server.http.middleware import RESPONSES_PATH, app_context, request_context
from server.http.request_context import RequestContext
from server.http.respond import check_model, json_response, prepare_prompt, respond
from server.http.routing import api_router, generates, raises
from server.http.session_name import name_session
from server.http.wire import only
from server.protocol import AnswerRules, Conversation, GenerationRequest, Grammar, Prompt, SamplingParams

router = api_router(RESPONSES_PATH)

_PARAMS = {"messages": "input", "reasoning_effort": "reasoning.effort"}
"""This API's names of fields that the shared modules name otherwise."""


class RetrieveQuery(BaseModel):
    """Only background responses could be streamed again, and they are not supported."""

    model_config = ConfigDict(extra="forbid")
    stream: Annotated[str | None, only("false")] = None
    include_obfuscation: Annotated[str | None, only("false")] = None
    starting_after: Annotated[str | None, only()] = None
    include: Annotated[list[str] | None, only(), Field(alias="include[]")] = None


class ItemsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")
    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    include: Annotated[list[str] | None, only(), Field(alias="include[]")] = None


@router.post(
    "",
    response_model=ResponseBody,
    responses=generates(ResponseEvent, links=("retrieve_response", "delete_response", "input_items")),
)
async def create_response(request: Request, asked: ResponsesRequest) -> Response:
    """Generate a response."""
    app, context = app_context(request), request_context(request)
    check_model(asked.model, app.engine.model)
    earlier, new = _context(store_of(request), context.owner, asked)
    chain = _session(asked, earlier, new, context.request_id)
    session = name_session(request, asked.prompt_cache_key, bool(asked.stream), default=chain)

    def keep(body: ResponseBody) -> None:
        if asked.stored:
            store_of(request).add(StoredResponse(owner=context.owner, session=session, input=new, response=body))

    with _renamed_errors():
        rules, prompt, grammar = await _prepare(request, asked, [*_items(earlier), *new])
    sampling = asked.sampling(app.engine.model.sampling)
    renderer = ResponseRenderer(
        _blank(asked, sampling, rules, context, app.engine.model.id), asked.wants_logprobs, keep
    )
    wanted = GenerationRequest(
        request_id=context.request_id,
        prompt=prompt,
        max_tokens=asked.max_output_tokens,
        sampling=sampling,
        session=session,
        owner=context.owner,
        logprobs=(asked.top_logprobs or 0) if asked.wants_logprobs else None,
        rules=rules,
        grammar=grammar,
    )
    try:
        with _renamed_errors():
            return await respond(request, [wanted], renderer, stream=bool(asked.stream))
    except ContextLengthExceeded as error:
        if not asked.stream:
            raise
        # As OpenAI's API does. Codex shortens the conversation only if this error is in the stream.
        context.error = error.code
        return Response(b"".join(renderer.fail(error)), media_type="text/event-stream")


@router.post("/input_tokens", response_model=InputTokens, responses=raises(NotFound))
async def input_tokens(request: Request, asked: InputTokensRequest) -> Response:
    """Count the tokens of a response's prompt."""
    app, context = app_context(request), request_context(request)
    if asked.model is not None:
        check_model(asked.model, app.engine.model)
    earlier, new = _context(store_of(request), context.owner, asked)
    with _renamed_errors():
        _, prompt, _ = await _prepare(request, asked, [*_items(earlier), *new])
    return json_response(InputTokens(object="response.input_tokens", input_tokens=len(prompt.tokens)))


@router.get("/{response_id}", response_model=ResponseBody, responses=raises(NotFound))
async def retrieve_response(request: Request, response_id: str, query: Annotated[RetrieveQuery, Query()]) -> Response:
    """A stored response. 404 if it does not exist or belongs to another key."""
    return json_response(store_of(request).get(request_context(request).owner, response_id).response)


@router.delete("/{response_id}", response_model=DeletedResponse, responses=raises(NotFound))
async def delete_response(request: Request, response_id: str) -> Response:
    """Delete a response, in memory and on disk. Its KV session stays."""
    store_of(request).remove(request_context(request).owner, response_id)
    return json_response(DeletedResponse(id=response_id, object="response", deleted=True))


@router.get("/{response_id}/input_items", response_model=ItemList, responses=raises(NotFound))
async def input_items(request: Request, response_id: str, query: Annotated[ItemsQuery, Query()]) -> Response:
    """The items that a response was made from, with the conversation before it, page by page."""
    store, owner = store_of(request), request_context(request).owner
    stored = store.get(owner, response_id)
    items = [*_items(store.chain(owner, stored.previous)), *stored.input]
    if query.order == "desc":
        items.reverse()
    if query.after is not None:
        ids = [item.id for item in items]
        if query.after not in ids:
            raise NotFound(f"Item with id '{query.after[:100]}' not found.", param="after")
        items = items[ids.index(query.after) + 1 :]
    page = items[: query.limit]
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    more = len(items) > len(page)
    return json_response(ItemList(object="list", data=page, first_id=first, last_id=last, has_more=more))


def _context(store: ResponseStore, owner: str, asked: ResponseInput) -> tuple[list[StoredResponse], list[Item]]:
    """The conversation's earlier responses and the request's new items. Raises NotFound for missing ones."""
    earlier = store.chain(owner, asked.previous_response_id)
    new = [store.item(owner, item.id) if isinstance(item, ItemReference) else item for item in asked.items()]
    return earlier, new


def _items(earlier: Sequence[StoredResponse]) -> list[Item]:
    return [item for stored in earlier for item in (*stored.input, *stored.response.output)]


def _session(
    asked: ResponsesRequest, earlier: Sequence[StoredResponse], new: Sequence[Item], response_id: str
) -> str | None:
    """The KV session's name if the client gives none."""
    if earlier:
        return earlier[-1].session or earlier[0].id
    has_answers = any(item.type != "message" or item.role == "assistant" for item in new)
    return response_id if asked.stored and not has_answers else None


async def _prepare(
    request: Request, asked: ResponseInput, items: Sequence[Item]
) -> tuple[AnswerRules, Prompt, Grammar | None]:
    """The rules, prompt and grammar. Functions that are strict only by default are not if no grammar can enforce their
    schemas.
    """
    conversation = Conversation(
        messages_of(asked.instructions, items),
        tools=[tool.template() for tool in asked.functions],
        reasoning_effort=asked.reasoning.effort if asked.reasoning else None,
    )
    rules = asked.rules()
    try:
        return rules, *await prepare_prompt(request, conversation, rules)
    except InvalidRequest:
        if not asked.strict_by_default:
            raise
    rules = asked.rules(strict=False)
    return rules, *await prepare_prompt(request, conversation, rules)


@contextmanager
def _renamed_errors() -> Iterator[None]:
    """Renames fields in errors as this API does."""
    try:
        yield
    except InvalidRequest as error:
        if error.param in _PARAMS:
            error.message = error.message.replace(f"'{error.param}'", f"'{_PARAMS[error.param]}'")
            error.param = _PARAMS[error.param]
        raise


def _blank(
    asked: ResponsesRequest, sampling: SamplingParams, rules: AnswerRules, context: RequestContext, model: str
) -> ResponseBody:
    """The response before any output: the request's fields and their defaults."""
    choice, reasoning = asked.tool_choice, asked.reasoning
    tools = [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": rule.strict,
        }
        for tool, rule in zip(asked.functions, rules.tools, strict=True)
    ]
    return ResponseBody(
        id=context.request_id,
        object="response",
        created_at=int(time.time()),
        status="in_progress",
        completed_at=None,
        background=False,
        error=None,
        incomplete_details=None,
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        max_tool_calls=asked.max_tool_calls,
        metadata=asked.metadata or {},
        model=model,
        output=[],
        parallel_tool_calls=rules.parallel,
        previous_response_id=asked.previous_response_id,
        prompt_cache_key=asked.prompt_cache_key,
        reasoning={"effort": reasoning.effort if reasoning else None, "summary": None},
        safety_identifier=asked.safety_identifier,
        service_tier="default",
        store=asked.stored,
        temperature=sampling.temperature,
        text={"format": asked.format.model_dump(by_alias=True, exclude_none=True), "verbosity": "medium"},
        tool_choice=choice.model_dump() if isinstance(choice, BaseModel) else choice or "auto",
        tools=tools,
        top_logprobs=asked.top_logprobs or 0,
        top_p=sampling.top_p,
        truncation="disabled",
        usage=None,
        user=asked.user,
    )
