"""Several answers to one prompt, and answers held to grammars, in the engine's batches."""

import json
from collections.abc import Callable
from dataclasses import replace
from queue import Queue

import pytest

from server.engine.engine import MlxEngine
from server.errors import GrammarFailed, OutOfMemory, QueueFull
from server.http.respond import expand_n
from server.protocol import (
    AnswerRules,
    Conversation,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    SamplingParams,
    TextDelta,
)
from tests.server.engine.answers import Answer, owned_by_nobody
from tests.server.text.test_grammar import POINT, TOOLS
from tests.serving.launch import filler
from turbocache.mlxlm.batch_generator import ShortPromptGenerator

pytestmark = pytest.mark.slow

HOT = SamplingParams(temperature=1.0, seed=11)


class Group:
    """Requests that are submitted together; `texts` by choice once all have ended."""

    def __init__(self, engine: MlxEngine, requests: list[GenerationRequest]) -> None:
        self.events: Queue[Event] = Queue()
        self.ends: dict[int, Finished | Failed] = {}
        self.texts = dict.fromkeys((request.choice for request in requests), "")
        engine.submit(requests, self.events.put)

    def end(self) -> "Group":
        while len(self.ends) < len(self.texts):
            event = self.events.get(timeout=60)
            assert event.choice not in self.ends
            if isinstance(event, TextDelta):
                self.texts[event.choice] += event.text
            elif isinstance(event, Finished | Failed):
                self.ends[event.choice] = event
        return self


def asked(engine: MlxEngine, text: str, name: str | None = None, sampling: SamplingParams = HOT) -> GenerationRequest:
    prompt = engine.tokenize(Conversation([{"role": "user", "content": text}]))
    return GenerationRequest("request-a", prompt, 12, sampling=sampling, session=name)


def test_answers_to_one_prompt_read_it_once_and_leave_one_session(engine: MlxEngine) -> None:
    request = asked(engine, filler(40, 3), "talk")
    group = Group(engine, expand_n(request, 4)).end()
    usages = [end.usage for end in group.ends.values() if isinstance(end, Finished)]
    n = len(request.prompt.tokens)
    assert sorted(usage.cached_tokens for usage in usages) == [0, n - 1, n - 1, n - 1]
    assert len(set(group.texts.values())) > 1
    assert [row["id"] for row in engine.sessions()] == ["talk"]
    assert owned_by_nobody(engine)


def test_each_answer_is_that_of_its_own_seed(engine: MlxEngine) -> None:
    request = asked(engine, "Hello!")
    group = Group(engine, expand_n(request, 3)).end()
    for i in range(3):
        alone = replace(request, request_id=f"alone-{i}", sampling=replace(HOT, seed=11 + i))
        assert Group(engine, [alone]).end().texts[0] == group.texts[i]


def test_more_answers_than_places_in_the_batch(start: Callable[..., MlxEngine]) -> None:
    engine = start(max_batch=2)
    group = Group(engine, expand_n(asked(engine, "Hello!", sampling=replace(HOT, seed=None)), 5)).end()
    assert all(isinstance(end, Finished) for end in group.ends.values())
    assert owned_by_nobody(engine)


def test_all_or_none_are_accepted(engine: MlxEngine) -> None:
    heavy = replace(asked(engine, "Hello!"), max_tokens=4000)
    with pytest.raises(OutOfMemory):
        engine.submit(expand_n(heavy, 100), lambda event: None)
    assert len(engine.services.queue) == 0
    assert engine.services.budget.promised == 0
    assert Answer(engine, "Hello!", None).text()
    engine.services.queue._limit = 0
    with pytest.raises(QueueFull):
        engine.submit(expand_n(heavy, 2), lambda event: None)


def test_cancelling_one_leaves_the_others(engine: MlxEngine) -> None:
    requests = expand_n(replace(asked(engine, "Hello!"), max_tokens=None), 3)
    group = Group(engine, requests)
    engine.cancel(requests[1].request_id)
    del group.texts[1]
    group.end()
    assert owned_by_nobody(engine)


def test_answers_beside_one_that_is_gone_are_given_all_the_same(engine: MlxEngine) -> None:
    requests = expand_n(asked(engine, filler(60, 4)), 2)
    group = Group(engine, requests)
    engine.cancel(requests[0].request_id)
    del group.texts[0]
    assert isinstance(group.end().ends[1], Finished)


def test_rows_of_one_batch_are_held_to_grammars_of_their_own(engine: MlxEngine) -> None:
    schema, call = AnswerRules(schema=POINT), AnswerRules(TOOLS, "required", parallel=False)
    base = replace(asked(engine, "Hello!"), max_tokens=60)
    requests = [
        replace(base, request_id=f"r{i}", choice=i, rules=rules, grammar=engine.constrain(rules, base.prompt))
        for i, rules in enumerate([schema, AnswerRules(), call, schema])
    ]
    group = Group(engine, requests).end()
    for i in (0, 3):
        assert set(json.loads(group.texts[i])) == {"x", "y"}
    plain = Group(engine, [replace(base, request_id="again")]).end().texts[0]
    assert group.texts[1] == plain
    assert group.texts[2] == ""
    end = group.ends[2]
    assert isinstance(end, Finished)
    assert end.finish_reason == "tool_calls"


def test_a_grammar_that_gives_up_fails_its_row_alone(engine: MlxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = AnswerRules(schema=POINT)
    base = replace(asked(engine, "Hello!"), max_tokens=40)
    held = replace(base, request_id="held", choice=1, rules=rules, grammar=engine.constrain(rules, base.prompt))
    consumed = []

    current_token = ShortPromptGenerator.current_token

    def latest(batch: ShortPromptGenerator, uid: int) -> int | None:
        token = current_token(batch, uid)
        consumed.append(token)
        return token if len(consumed) < 4 else 10  # a token that the grammar does not know here

    monkeypatch.setattr(ShortPromptGenerator, "current_token", latest)
    group = Group(engine, [base, held]).end()
    assert isinstance(group.ends[0], Finished)
    failed = group.ends[1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, GrammarFailed)
    assert group.texts[1].startswith('{"')
    assert owned_by_nobody(engine)
    assert Answer(engine, "Hello!", None).text()
