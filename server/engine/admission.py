"""What a request must satisfy before it waits: known tokens, a prompt that fits, a place in the queue, and memory."""

from collections.abc import Sequence
from dataclasses import replace

from server.commands import QueuedRequest
from server.engine.budget import Budget
from server.engine.queue import WaitingQueue
from server.engine.running import ANSWER_STEP
from server.engine.sampling import clamp_sampling
from server.errors import OutOfMemory
from server.protocol import Deliver, GenerationRequest, ModelInfo
from server.text.chat_template import check_tokens


def admit(
    requests: Sequence[GenerationRequest], deliver: Deliver, model: ModelInfo, queue: WaitingQueue, budget: Budget
) -> list[QueuedRequest]:
    """Count all requests in the queue and promise memory to each, or raise and change nothing.

    Raises InvalidRequest (a token that the model does not have), ContextLengthExceeded, QueueFull and OutOfMemory.
    """
    admitted = [_checked(request, deliver, model) for request in requests]
    queue.enter(len(admitted))
    promised: list[str] = []
    try:
        for queued in admitted:
            id, n_prompt = queued.request.request_id, len(queued.request.prompt.tokens)
            budget.promise(id, n_prompt + queued.promised, n_prompt)
            promised.append(id)
    except OutOfMemory:
        queue.leave(len(admitted))
        for id in promised:
            budget.release(id)
        raise
    return admitted


def _checked(request: GenerationRequest, deliver: Deliver, model: ModelInfo) -> QueuedRequest:
    # An unknown token would read behind the embeddings, and a bias for it would write behind the logits.
    check_tokens(request.prompt.tokens, model.n_tokens, request.prompt.param)
    check_tokens([token for token, _ in request.sampling.logit_bias], model.n_tokens, "logit_bias")
    request = replace(request, sampling=clamp_sampling(request.sampling, model.n_tokens))
    limit = model.answer_limit(len(request.prompt.tokens), request.max_tokens, request.prompt.param)
    # Without max_tokens the promise starts small and grows with the answer.
    promised = limit if request.max_tokens is not None else min(limit, ANSWER_STEP)
    return QueuedRequest(request, _with_choice(request.choice, deliver), limit, promised)


def _with_choice(choice: int, deliver: Deliver) -> Deliver:
    """Sets `choice` in all events of an answer."""
    return deliver if choice == 0 else lambda event: deliver(replace(event, choice=choice))
