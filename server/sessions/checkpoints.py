"""Checkpoints: states of a session's cache that a later turn can start from.

A chat template drops earlier reasoning, or a client edits its last message: the new prompt then differs from the cached
tokens at some place, and the cache behind that place is of no use. Trimming the cache does not bring back pages that
rotated out, nor recurrent states. A checkpoint is a cache of its own that shares its pages. A turn that starts from one
is as exact as if no token had followed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from server.protocol import Prompt
from server.sessions.starts import LEAST_SHARED
from turbocache.mlxlm.prompt_cache import PromptCache
from turbocache.store import CacheStore

Kind = Literal["system", "prompt", "tool", "answer"]
"""Where a checkpoint is: at the end of the system message, of a user's prompt, of a prompt that ends with a tool's
result, or of an answer.
"""

MOST = 4
"""Checkpoints of one session. Each holds a raw sink and window of its own."""


@dataclass(slots=True, eq=False)
class Checkpoint:
    """A cache that holds exactly `tokens` (int32). It never changes: turns get a fork. Compared by identity."""

    kind: Kind
    tokens: np.ndarray
    cache: PromptCache
    last_used: float = 0.0


def prompt_kind(prompt: Prompt) -> Kind:
    """The kind of the checkpoint at a prompt's end."""
    return "tool" if prompt.after_tool_result else "prompt"


def prompt_stops(prompt: Prompt, cached: int, cache_store: CacheStore) -> dict[int, Kind]:
    """Numbers of prompt tokens after which prefill stops for a checkpoint, and their kinds. If caches can't go back,
    one is taken before the tokens that open the answer.
    """
    stops = dict[int, Kind]()
    if not cache_store.can_checkpoint:
        return stops
    if prompt.system_end >= cached + LEAST_SHARED:
        stops[prompt.system_end] = "system"
    if prompt.messages_end > cached and not cache_store.can_go_back:
        stops[prompt.messages_end] = prompt_kind(prompt)
    return stops


def added(checkpoints: list[Checkpoint], new: Checkpoint) -> list[Checkpoint]:
    """The checkpoints of a session with a new one, which replaces one of the same tokens. If there are too many, the
    least recently used is dropped; `turn_start` and then the end of the system message go last.
    """
    others = [old for old in checkpoints if not np.array_equal(old.tokens, new.tokens)]
    start = turn_start(others)
    others.sort(key=lambda checkpoint: (checkpoint.kind == "system", checkpoint is start, checkpoint.last_used))
    return sorted([*others[-(MOST - 1) :], new], key=lambda checkpoint: checkpoint.last_used)


def turn_start(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The checkpoint at the end of the user's last prompt. Templates keep the reasoning of a turn while its tools run,
    and drop it with the user's next message. The next prompt then differs from here on, many tool results ago.
    """
    prompts = [checkpoint for checkpoint in checkpoints if checkpoint.kind == "prompt"]
    return max(prompts, key=lambda checkpoint: len(checkpoint.tokens), default=None)
