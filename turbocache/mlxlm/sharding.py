"""Tensor parallelism by mlx-lm: each rank keeps its own heads and its part of every large matrix."""

import gc
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from turbocache.mlxlm.group import Group
from turbocache.mlxlm.plan import LayerPlan, plan_layers


class Unshardable(ValueError):
    """This group can't serve the model. The message says why."""


def shard(model: Module, group: Group) -> None:
    """Reduce a model, best loaded lazily, to this rank's share of weights and KV heads. Raises Unshardable."""
    kind, n = getattr(model, "model_type", type(model).__module__), group.size
    if not hasattr(model, "shard"):
        raise Unshardable(f"mlx-lm can't shard models of the type {kind!r}: serve it with one process")
    before = plan_layers(model)
    for heads in sorted({plan.geometry.n_kv_heads for plan in before if plan.geometry is not None}):
        if heads % n:
            raise Unshardable(
                f"the model has {heads} KV heads, which {n} ranks can't share equally: start a number that divides them"
            )
    try:
        model.shard(group.ranks)
    except (ValueError, RuntimeError) as error:
        raise Unshardable(f"mlx-lm can't divide this model's weights by {n}: {error}") from error
    gc.collect()  # the whole layers are in reference cycles
    for _, share in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())):
        mx.eval(share)  # one by one, so that at most one whole weight is in memory
    _check_shares(before, plan_layers(model), n)


def _check_shares(before: list[LayerPlan], after: list[LayerPlan], n: int) -> None:
    """Raise Unshardable if a rank keeps all KV heads of a layer: it would keep all of that layer's cache."""
    for i, (whole, share) in enumerate(zip(before, after, strict=True)):
        if whole.geometry is None or share.geometry is None:
            continue
        if share.geometry.n_kv_heads * n != whole.geometry.n_kv_heads:
            raise Unshardable(
                f"mlx-lm leaves {share.geometry.n_kv_heads} of {whole.geometry.n_kv_heads} KV heads of layer {i} to "
                f"each of {n} ranks, so the cache would not be shared"
            )
