"""server.text.chat_template: what a conversation's wishes become in the options of a chat template."""

from typing import Any

import pytest

from server.errors import InvalidRequest, UnsupportedField
from server.protocol import Conversation
from server.text.chat_template import PromptBuilder
from turbocache.mlxlm.model import LoadedModel

USER = {"role": "user", "content": "hi"}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
SWITCH = PLAIN + "{{ enable_thinking }}"
EFFORT = PLAIN + "{{ reasoning_effort }}"
BOTH = SWITCH + " {{ reasoning_effort }}"


@pytest.fixture
def ending(bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ending(template, ...) is what a prompt by this template says behind its opening."""

    def said(template: str, **wishes: Any) -> str:
        monkeypatch.setattr(bundled.tokenizer._tokenizer, "chat_template", template)
        builder = PromptBuilder(bundled)
        return builder.decode(builder.build(Conversation([USER], **wishes)).tokens).partition("> ")[2]

    return said


@pytest.mark.parametrize(
    ("template", "wishes", "expected"),
    [
        (PLAIN, {}, ""),
        (PLAIN, {"thinking": True, "reasoning_effort": "high", "ignore_unknown_effort": True}, ""),
        (PLAIN, {"thinking": False}, ""),
        (PLAIN, {"reasoning_effort": "none"}, ""),
        (SWITCH, {}, "True"),  # by mlx-lm
        (SWITCH, {"thinking": True}, "True"),
        (SWITCH, {"thinking": False, "reasoning_effort": "high"}, "False"),
        (SWITCH, {"reasoning_effort": "high"}, "True"),
        (SWITCH, {"thinking": True, "options": {"enable_thinking": False}}, "False"),
        (EFFORT, {"thinking": False, "reasoning_effort": "low", "ignore_unknown_effort": True}, "low"),
        (BOTH, {"thinking": True, "reasoning_effort": "low"}, "True low"),
    ],
)
def test_wishes(ending: Any, template: str, wishes: dict[str, Any], expected: str) -> None:
    assert ending(template, **wishes) == expected


def test_an_effort_that_the_template_knows_nothing_of(ending: Any) -> None:
    with pytest.raises(UnsupportedField):
        ending(PLAIN, reasoning_effort="high")


def test_a_begun_answer(bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation([USER, {"role": "assistant", "content": "Hel"}], continue_final_message=True)
    prompt = PromptBuilder(bundled).build(talk)
    assert prompt.continued
    assert bundled.tokenizer.decode(prompt.tokens).endswith("assistant\nHel")
    monkeypatch.setattr(bundled.tokenizer._tokenizer, "chat_template", "{{ messages[0].content }} {{ 'content' }}")
    with pytest.raises(InvalidRequest, match="can't go on with a begun answer"):
        PromptBuilder(bundled).build(talk)
