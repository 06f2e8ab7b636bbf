"""Grammars that constrain an answer, compiled by llguidance (https://github.com/guidance-ai/llguidance), and the logits
processor that applies one.
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
from server.text.assembler import Vocabulary
from server.text.grammar_text import GrammarText, check_schema
from server.text.tool_formats import ToolFormat

_MAX_CACHED = 64
"""Compiled grammars that are cached: agents send the same tools with every request."""


@dataclass(frozen=True, slots=True)
class CompiledGrammar(Grammar):
    """A grammar with its matcher. A copy of the matcher starts at the beginning."""

    matcher: LLMatcher
    tokenizer: LLTokenizer

    def guide(self, latest: Callable[[], int | None]) -> "Guide":
        return Guide(self.matcher.deep_copy(), self.tokenizer, latest)


class Guide:
    """Applies a grammar to one row, as a logits processor of mlx-lm. Logits are `[1, vocab]`; logits of tokens that the
    grammar forbids become -inf.

    latest: returns the row's last token, None before the first one.
    error: why the matcher failed, None while it works. After a failure logits are returned unchanged.
    """

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, latest: Callable[[], int | None]) -> None:
        self.error: str | None = None
        self._matcher = matcher
        self._eos_tokens = tokenizer.eos_tokens
        self._latest = latest
        self._bits = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.uint32)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        # Start the step's graph first: it runs while the previous token is read and the mask is computed.
        mx.async_eval(logits)
        token = self._latest()
        if token is not None and not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        if self._matcher.is_stopped():
            self._bits[:] = 0
            for end in self._eos_tokens:
                self._bits[end // 32] |= np.uint32(1 << end % 32)
        else:
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            self.error = self._matcher.get_error()
            return logits
        return _masked(logits, self._bits)


def _masked(logits: mx.array, bits: np.ndarray) -> mx.array:
    """Logits `[1, vocab]`, -inf where bit i of `bits` is 0 for token i. The tokenizer may have more or fewer tokens
    than the model has logits.
    """
    n = logits.shape[-1]
    allowed = ((mx.array(bits)[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1).reshape(-1)[:n].astype(mx.bool_)
    if allowed.size < n:
        allowed = mx.pad(allowed, (0, n - allowed.size))
    return mx.where(allowed, logits, mx.array(-mx.inf, dtype=logits.dtype))


class GrammarCompiler:
    """Compiles rules into grammars, and caches them. Safe to call from any thread."""

    def __init__(self, tokenizer: TokenizerWrapper, format: ToolFormat | None, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._format = format
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()

    def compile(self, rules: AnswerRules, in_thought: bool) -> CompiledGrammar | None:
        """The grammar of an answer, or None if the rules do not constrain it. `in_thought`: the prompt leaves a thought
        open. Raises InvalidRequest and UnsupportedField; see `server.protocol.Engine.constrain`.
        """
        if rules.tools and self._format is None:
            raise UnsupportedField(
                "The model's chat template knows no tools and takes no system message that describes them. Models with "
                "tools are, among others, Qwen3, Llama 3.1 and later, Mistral and GLM.",
                param="tools",
            )
        strict = any(tool.strict for tool in rules.tools)
        free = rules.tool_choice == "auto" and rules.allowed_tools is None and not strict
        if rules.schema is None and (free or not rules.tools):
            return None
        text = GrammarText(self._tokenizer, self._vocabulary.ll_tokenizer)
        text.answer(rules, self._format, in_thought)
        return self._compile_text(text)

    def with_matcher(self, grammar: Grammar | None) -> CompiledGrammar | None:
        """A request's grammar, compiled. It has its matcher already on the rank that compiled it; other ranks get its
        source only.
        """
        if grammar is None or isinstance(grammar, CompiledGrammar):
            return grammar
        with self._lock:
            cached = self._compiled.get(grammar.source)
        return cached or self._keep(grammar.source, self._matcher(grammar.source))

    def _matcher(self, source: str) -> LLMatcher:
        return LLMatcher(self._vocabulary.ll_tokenizer, source, log_level=0)

    def _compile_text(self, text: GrammarText) -> CompiledGrammar:
        source = text.source()
        with self._lock:
            if (cached := self._compiled.get(source)) is not None:
                self._compiled.move_to_end(source)
                return cached
        for schema, param, options in text.schemas:  # one by one, so that the error names the schema that is wrong
            check_schema(schema, param, self._vocabulary.ll_tokenizer, options)
        matcher = self._matcher(source)
        if matcher.is_error():
            error = matcher.get_error().strip().splitlines()[0]
            raise InvalidRequest(f"The tools and schemas of this request make no grammar: {error}", param="tools")
        return self._keep(source, matcher)

    def _keep(self, source: str, matcher: LLMatcher) -> CompiledGrammar:
        compiled = CompiledGrammar(source, matcher, self._vocabulary.ll_tokenizer)
        with self._lock:
            self._compiled[source] = compiled
            while len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        return compiled
