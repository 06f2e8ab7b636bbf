"""Loads a model through mlx-lm in a form that suits the machine."""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, get_total_parameters, hf_repo_to_path

from kernels.attention.device import on_cpu
from turbocache.machine.memory import available_memory
from turbocache.mlxlm.group import Group
from turbocache.mlxlm.sharding import Unshardable, shard
from turbocache.models import ModelCard, read_card

_SHARE_OF_MEMORY = 0.5
_NO_LIMIT = 1 << 20


class ModelError(RuntimeError):
    """The model can't be loaded. The message says which, why and what to do."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to generate."""

    model: Module
    tokenizer: TokenizerWrapper
    id: str
    created: int
    """Unix time in seconds."""
    max_positions: int
    """The model's own limit in tokens."""
    dtype: mx.Dtype
    notes: tuple[str, ...]
    """What was changed at load, for people."""
    card: ModelCard = field(default_factory=ModelCard)
    generation_config: dict[str, Any] = field(default_factory=dict)
    """generation_config.json: how the model's makers draw tokens. Not checked."""


def load_model(source: str | Path, group: Group | None = None) -> LoadedModel:
    """Load a local directory or a Hugging Face id. Each rank of a `group` loads its share.

    On a CPU the model computes in float32, because half precision is emulated there. Quantised weights are expanded
    there if they then take at most half of the free memory. Raises ModelError.
    """
    path, group = str(source), Group() if group is None else group
    try:
        loaded = load(path, lazy=not group.alone, return_config=True)
    except Exception as error:  # hub, file, config and weight errors have no common base
        raise ModelError(_load_advice(path, error)) from error
    model, tokenizer, config = cast(tuple[Module, TokenizerWrapper, dict[str, Any]], loaded)
    notes = _suit_cpu(model, group) if on_cpu() else []
    if not group.alone:
        try:
            shard(model, group)
        except Unshardable as error:
            raise ModelError(f"can't serve the model {path!r} with {group.size} ranks: {error}.") from error
        notes.append(f"rank {group.rank} of {group.size}: a share of its weights and KV heads")
    mx.eval(model.parameters())
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        id=Path(path).name if Path(path).is_dir() else path,
        created=int(time.time()),
        max_positions=_max_positions(config, tokenizer),
        dtype=_compute_dtype(model),
        notes=tuple(notes),
        card=_card(path),
        generation_config=_generation_config(path),
    )


def wrapped_tokenizer(tokenizer: TokenizerWrapper) -> Any:
    """The transformers tokenizer inside mlx-lm's wrapper, for libraries that check the type."""
    return tokenizer._tokenizer


def _folder(path: str) -> Path:
    """Where the files of a loaded model are. If that can't be told, a folder that does not exist."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(hf_repo_to_path(path))
    except Exception:  # what it says is worth no failed start
        return Path(path)


def _card(path: str) -> ModelCard:
    card = read_card(_folder(path))
    if card.origin is None and not Path(path).is_dir():
        return replace(card, origin=f"https://huggingface.co/{path}")
    return card


def _generation_config(path: str) -> dict[str, Any]:
    try:
        said = json.loads((_folder(path) / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _suit_cpu(model: Module, group: Group) -> list[str]:
    notes = []
    if any(name.endswith(".scales") for name, _ in _parameters(model)):
        needed = get_total_parameters(model) * mx.float32.size // group.size
        if group.agree(needed <= available_memory() * _SHARE_OF_MEMORY):
            dequantize_model(model)
            notes.append("quantised weights expanded for the CPU")
        else:
            notes.append(
                f"quantised weights kept: expanded they take {needed / 2**30:.1f} GiB, over half of what is free"
            )
    model.set_dtype(mx.float32)
    notes.append("computing in float32 on the CPU")
    return notes


def _max_positions(config: dict[str, Any], tokenizer: TokenizerWrapper) -> int:
    """The model's position limit from its config, else from its tokenizer."""
    for part in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "max_seq_len", "n_positions", "model_max_length"):
            if isinstance(part.get(key), int):
                return int(part[key])
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if isinstance(limit, int) and limit < _NO_LIMIT else _NO_LIMIT


def _compute_dtype(model: Module) -> mx.Dtype:
    """The dtype of the norms' weights, which quantisation leaves alone."""
    floats = [
        value.dtype for name, value in _parameters(model) if mx.issubdtype(value.dtype, mx.floating) and "norm" in name
    ]
    return floats[0] if floats else mx.float32


def parameter_nbytes(model: Module) -> int:
    """Bytes of all weights."""
    return sum(value.nbytes for _, value in _parameters(model))


def _parameters(model: Module) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))


def _load_advice(path: str, error: Exception) -> str:
    what = f"can't load the model {path!r}: {type(error).__name__}: {error}"
    if Path(path).exists():
        return f"{what}. The directory must hold config.json, safetensors weights and a tokenizer."
    return f"{what}. Give TURBOCACHE_MODEL a local directory or a Hugging Face id that this machine can reach."
