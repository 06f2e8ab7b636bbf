"""What the engine makes of a request when it is accepted: checked, bounded, and promised a first part of its answer."""

from dataclasses import replace

from server.engine.queue import QueuedRequest
from server.engine.running import ANSWER_STEP
from server.engine.sampling import bearable
from server.errors import ContextLengthExceeded, InvalidRequest
from server.protocol import Deliver, GenerationRequest, ModelInfo


def queued(request: GenerationRequest, deliver: Deliver, model: ModelInfo) -> QueuedRequest:
    """A request as it waits. Raises InvalidRequest for tokens that the model does not have, ContextLengthExceeded."""
    _check_tokens(request, model.n_tokens)
    request = replace(request, sampling=bearable(request.sampling, model.n_tokens))
    limit = _answer_limit(request, model.max_tokens)
    # Without max_tokens the promise starts small and grows as the answer does.
    allowed = limit if request.max_tokens is not None else min(limit, ANSWER_STEP)
    return QueuedRequest(request, _of_choice(request.choice, deliver), limit, allowed)


def _of_choice(choice: int, deliver: Deliver) -> Deliver:
    """Stamps an answer's events with its place among several."""
    return deliver if choice == 0 else lambda event: deliver(replace(event, choice=choice))


def _check_tokens(request: GenerationRequest, n_tokens: int) -> None:
    """A token beyond the vocabulary would be read beyond the embeddings, a bias written beyond the logits."""
    for token in request.prompt.tokens:
        if not 0 <= token < n_tokens:
            raise _unknown(request.prompt.param, token, n_tokens)
    for token, _ in request.sampling.logit_bias:
        if token >= n_tokens:
            raise _unknown("logit_bias", token, n_tokens)


def _unknown(param: str, token: int, n_tokens: int) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid '{param}': {token} is not a token of the model, whose tokens end at {n_tokens - 1}.",
        param=param,
        code="invalid_value",
    )


def _answer_limit(request: GenerationRequest, limit: int) -> int:
    n_prompt = len(request.prompt.tokens)
    if n_prompt >= limit or n_prompt + (request.max_tokens or 0) > limit:
        raise ContextLengthExceeded(
            limit=limit, prompt_tokens=n_prompt, max_tokens=request.max_tokens, param=request.prompt.param
        )
    return request.max_tokens or limit - n_prompt
