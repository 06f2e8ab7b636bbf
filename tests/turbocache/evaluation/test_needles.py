import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from turbocache.evaluation.needles import OTHER, Needle, ask, load_needles, make_needles, recall
from turbocache.evaluation.settings import EvaluationError
from turbocache.mlxlm.model import LoadedModel


@pytest.fixture(scope="module")
def hay(text: Path) -> str:
    return text.read_text()


def test_made_needles_have_the_length_and_the_depth(bundled: LoadedModel, hay: str) -> None:
    made = make_needles(bundled.tokenizer, hay, {200: 2, 500: 2}, (0.0, 0.5, 1.0), seed=1)
    assert [(n.context, n.depth) for n in made] == [(c, d) for c in ("200", "500") for d in (0, 0.5, 1) for _ in (1, 2)]
    for needle in made:
        assert int(needle.context) - 8 <= len(needle.ids) <= int(needle.context)
        prompt = bundled.tokenizer.decode(list(needle.ids))
        assert prompt.count(needle.answer) == 1
        before = len(bundled.tokenizer.encode(prompt[: prompt.index(needle.answer)]))
        assert needle.depth is not None
        assert before / len(needle.ids) == pytest.approx(needle.depth, abs=0.25)
    depths = [bundled.tokenizer.decode(list(n.ids)).index(n.answer) for n in made[6::2]]
    assert depths == sorted(depths)
    assert len({needle.answer for needle in made}) == 12


def test_the_seed_decides(bundled: LoadedModel, hay: str) -> None:
    first, again, other = (make_needles(bundled.tokenizer, hay, {200: 2}, (0.5,), seed) for seed in (1, 1, 2))
    assert first == again
    assert {needle.ids for needle in first}.isdisjoint(needle.ids for needle in other)
    # More of them do not change those that there were: a run can be extended.
    assert make_needles(bundled.tokenizer, hay, {150: 1, 200: 3}, (0.5,), 1)[1:3] == first


def test_text_that_is_too_short_is_told(bundled: LoadedModel, hay: str) -> None:
    with pytest.raises(EvaluationError, match="too few to hide needles in 9000"):
        make_needles(bundled.tokenizer, hay, {9000: 1}, (0.5,), 0)
    with pytest.raises(EvaluationError, match="a prompt of 20 tokens has no room"):
        make_needles(bundled.tokenizer, hay, {20: 1}, (0.5,), 0)


def test_greedy_answers_are_judged_by_what_they_contain(bundled: LoadedModel, hay: str) -> None:
    needle = make_needles(bundled.tokenizer, hay, {160: 1}, (0.5,), seed=0)[0]

    def found(asked: Needle, chunk: int = 64) -> bool:
        return ask(bundled.model, bundled.tokenizer, make_prompt_cache(bundled.model), asked, chunk)

    assert found(needle)
    assert found(needle, 7)
    assert not found(replace(needle, answer=needle.answer[:-1] + str((int(needle.answer[-1]) + 1) % 10)))
    assert not found(replace(needle, answer=needle.answer + "0"))


class Scripted:
    """A model that answers with given tokens and notes what it is fed."""

    def __init__(self, answer: list[int]) -> None:
        self.answer, self.fed = iter(answer), list[int]()
        self.last = 0

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        self.fed += tokens[0].tolist()  # type: ignore[arg-type]
        self.last = next(self.answer) if tokens.shape[1] == 1 else 0
        return mx.broadcast_to(mx.arange(50) == self.last, (1, tokens.shape[1], 50)).astype(mx.float32)


class Digits:
    eos_token_ids = frozenset([3])

    def decode(self, ids: list[int]) -> str:
        return "".join(str(n) for n in ids)


@pytest.mark.parametrize("chunk", [2, 3, 5, 100])
def test_the_model_reads_the_prompt_once_and_writes_until_it_is_clear(chunk: int) -> None:
    needle = Needle("n", "9", 0.5, tuple(range(10, 19)), "78")
    for answer, found in (([6, 7, 8, 9], True), ([6, 3, 7, 8], False), ([7] * 48 + [8], False), ([7] * 47 + [8], True)):
        model = Scripted(answer)
        assert ask(model, Digits(), [], needle, chunk) is found  # type: ignore[arg-type]
        written = model.fed[9:]
        assert model.fed[:9] == list(needle.ids)
        assert written == answer[: len(written)]


def test_files_give_prompts_of_a_grid_and_others(bundled: LoadedModel, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "My number is 42."}, {"role": "user", "content": "What is my number?"}]
    items: list[dict[str, Any]] = [
        {"id": "one", "messages": chat, "answer": "42", "context": 64, "depth": 0.5, "more": 1},
        {"messages": chat, "answer": 42},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n\n")
    one, two = load_needles(path, bundled.tokenizer)
    assert (one.id, one.context, one.depth, one.answer) == ("one", "64", 0.5, "42")
    assert (two.id, two.context, two.depth, two.answer) == ("asked-2", OTHER, None, "42")
    wanted = bundled.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert bundled.tokenizer.decode(list(one.ids)) == wanted
    assert one.key != replace(one, answer="43").key != replace(one, ids=one.ids[1:]).key


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 of '.*asked.jsonl' is no needle .JSONDecodeError"),
        ("[]", "line 2 .* is no needle .TypeError"),
        ('{"answer": "1"}', "line 2 .* is no needle .KeyError: 'messages'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2 .* is no needle .KeyError: 'answer'"),
    ],
)
def test_lines_that_are_no_needles_are_told(bundled: LoadedModel, tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "asked.jsonl").write_text("\n" + line)
    with pytest.raises(EvaluationError, match=said):
        load_needles(tmp_path / "asked.jsonl", bundled.tokenizer)


def test_files_without_needles_are_told(bundled: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match="there are no needles in"):
        load_needles(tmp_path / "empty.jsonl", bundled.tokenizer)
    with pytest.raises(EvaluationError, match=r"can't read the needles '.*': No such file"):
        load_needles(tmp_path / "absent.jsonl", bundled.tokenizer)


def test_recall_is_over_all_depths_of_a_length() -> None:
    by_context, cells = recall(
        {("64", 0.1): [True] * 3, ("64", 0.9): [False], ("128", 0.1): [False], (OTHER, None): [True]}
    )
    assert by_context == {"64": 0.75, "128": 0, OTHER: 1}
    assert cells == {"64": {"0.1": [3, 3], "0.9": [0, 1]}, "128": {"0.1": [0, 1]}, OTHER: {"-": [1, 1]}}
