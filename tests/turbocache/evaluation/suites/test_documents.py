from collections.abc import Callable

import pytest

from turbocache.evaluation.settings import EvaluationError
from turbocache.evaluation.suites.arguments import ARGUMENTS
from turbocache.evaluation.suites.documents import chance_of, some_hay, some_names
from turbocache.evaluation.suites.facts import FACTS
from turbocache.evaluation.suites.suite import Material, Suite
from turbocache.evaluation.suites.sums import SUMS
from turbocache.evaluation.text import prompt_tokens

SUITES = pytest.mark.parametrize("suite", [FACTS, SUMS, ARGUMENTS], ids=lambda suite: suite.name)


@SUITES
def test_documents_have_their_size_and_their_answers(suite: Suite, material_of: Callable[..., Material]) -> None:
    material = material_of(suite_context=900)
    (task,) = suite.make(material)
    document = task._document
    decode = material.loaded.tokenizer.decode
    for question in document.questions:
        prompt = [*document.shared, *question.ids]
        assert 880 <= max(len(document.shared) + len(q.ids) for q in document.questions) <= 900
        assert len(question.ids) > 0
        assert decode(list(question.answer_ids)).strip() == question.answer.strip()
        # The tokens are those of the text in one piece.
        whole = decode([*prompt, *question.answer_ids])
        assert material.loaded.tokenizer.encode(whole, add_special_tokens=False) == [*prompt, *question.answer_ids]
    assert len(document.shared) > 600


@SUITES
def test_the_seed_and_the_trial_decide(suite: Suite, material_of: Callable[..., Material]) -> None:
    def keys(**options: int) -> list[str]:
        return [task.key for task in suite.make(material_of(**options))]

    first, second = keys(suite_trials=2)
    assert keys(suite_trials=1) == [first]
    assert {first, second}.isdisjoint(keys(suite_trials=2, seed=1))
    assert keys(suite_context=700) != [first]


def test_the_bundled_chat_and_plain_text_are_opened_alike(material: Material) -> None:
    class Plain:
        has_chat_template = False

        def encode(self, text: str, **_: object) -> str:
            return text

    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert "".join(prompt_tokens(Plain(), messages, "\nc")) == "a\nb\nc"  # type: ignore[arg-type]
    tokenizer = material.loaded.tokenizer
    assert tokenizer.decode(prompt_tokens(tokenizer, messages, "\nc")).endswith("assistant\nc")


def test_what_does_not_fit_is_told(material_of: Callable[..., Material]) -> None:
    with pytest.raises(EvaluationError, match="--suite-context 40 has no room for 12 sentences and a question"):
        FACTS.make(material_of(suite_context=40))
    short = material_of()
    with pytest.raises(EvaluationError, match=r"the text has \d+ tokens, and the suites need 100000"):
        some_hay(short, chance_of(short, "x"), 100_000)


def test_names_are_different(material: Material) -> None:
    names = some_names(chance_of(material, "names"), 60)
    assert len(set(names)) == 60
