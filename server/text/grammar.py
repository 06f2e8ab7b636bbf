"""What holds an answer to its rules: grammars by llguidance (https://github.com/guidance-ai/llguidance), and the way
through one of them.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.errors import InvalidRequest, UnsupportedField
from server.protocol import AnswerRules, Grammar
from server.text.grammar_text import GrammarText, check_schema
from server.text.tool_formats import ToolFormat

_KEPT = 64
"""Compiled grammars that are remembered: agents send the same tools with every request."""


@dataclass(frozen=True, slots=True)
class CompiledGrammar(Grammar):
    """A grammar that is known to compile. Copies of its matcher start anew."""

    matcher: LLMatcher
    lexicon: LLTokenizer

    def guide(self, latest: Callable[[], int | None]) -> "Guide":
        return Guide(self.matcher.deep_copy(), self.lexicon, latest)


class Guide:
    """One row's way through its grammar, as a logits processor of mlx-lm. Logits are `[1, vocab]`; those of tokens that
    can't follow become -inf.

    `latest` gives the row's last token, None before its first one. `error` says why the grammar could not go on; its
    row is no longer held to it then.
    """

    def __init__(self, matcher: LLMatcher, lexicon: LLTokenizer, latest: Callable[[], int | None]) -> None:
        self.error: str | None = None
        self._matcher = matcher
        self._lexicon = lexicon
        self._latest = latest
        self._bits = np.zeros(-(-lexicon.vocab_size // 32), dtype=np.uint32)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        # The step's own graph runs while the token before it is read and the mask is made.
        mx.async_eval(logits)
        token = self._latest()
        if token is not None and not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        if self._matcher.is_stopped():
            self._bits[:] = 0
            for end in self._lexicon.eos_tokens:
                self._bits[end // 32] |= np.uint32(1 << end % 32)
        else:
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            self.error = self._matcher.get_error()
            return logits
        return _masked(logits, self._bits)


def _masked(logits: mx.array, bits: np.ndarray) -> mx.array:
    """Logits `[1, vocab]` where bit i of `bits` allows token i, else -inf. A tokenizer may have fewer tokens than a
    model has logits, or more.
    """
    n = logits.shape[-1]
    allowed = ((mx.array(bits)[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1).reshape(-1)[:n].astype(mx.bool_)
    if allowed.size < n:
        allowed = mx.pad(allowed, (0, n - allowed.size))
    return mx.where(allowed, logits, mx.array(-mx.inf, dtype=logits.dtype))


class GrammarMaker:
    """Compiles rules into grammars. Safe to call from any thread."""

    def __init__(
        self, tokenizer: TokenizerWrapper, format: ToolFormat | None, lexicon: Callable[[], LLTokenizer]
    ) -> None:
        self._tokenizer = tokenizer
        self._format = format
        self._lexicon = lexicon
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()

    def make(self, rules: AnswerRules, in_thought: bool) -> CompiledGrammar | None:
        """The grammar of an answer, None where nothing must be held. `in_thought`: the prompt has opened a thought.
        Raises InvalidRequest and UnsupportedField, as `server.protocol.Engine.constrain` says.
        """
        if rules.tools and self._format is None:
            raise UnsupportedField("The model's chat template knows no tools, so it can't call any.", param="tools")
        strict = any(tool.strict for tool in rules.tools)
        free = rules.tool_choice == "auto" and rules.allowed_tools is None and not strict
        if rules.schema is None and (free or not rules.tools):
            return None
        text = GrammarText(self._tokenizer, self._lexicon())
        text.answer(rules, self._format, in_thought)
        return self._compile(text)

    def compiled(self, grammar: Grammar | None) -> CompiledGrammar | None:
        """What `make` has made, as it comes back with a request: the same object, or, on another rank than the one that
        made it, its text.
        """
        if grammar is None or isinstance(grammar, CompiledGrammar):
            return grammar
        with self._lock:
            known = self._compiled.get(grammar.source)
        matcher = None if known is not None else LLMatcher(self._lexicon(), grammar.source, log_level=0)
        return known if matcher is None else self._keep(CompiledGrammar(grammar.source, matcher, self._lexicon()))

    def _compile(self, text: GrammarText) -> CompiledGrammar:
        source = text.source()
        with self._lock:
            if (known := self._compiled.get(source)) is not None:
                self._compiled.move_to_end(source)
                return known
        for schema, param, options in text.schemas:  # each by itself, so that the error names the one that is wrong
            check_schema(schema, param, self._lexicon(), options)
        matcher = LLMatcher(self._lexicon(), source, log_level=0)
        if matcher.is_error():
            error = matcher.get_error().strip().splitlines()[0]
            raise InvalidRequest(f"The tools and schemas of this request make no grammar: {error}", param="tools")
        return self._keep(CompiledGrammar(source, matcher, self._lexicon()))

    def _keep(self, compiled: CompiledGrammar) -> CompiledGrammar:
        with self._lock:
            self._compiled[compiled.source] = compiled
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return compiled
