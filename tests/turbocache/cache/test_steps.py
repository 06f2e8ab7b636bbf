from typing import ClassVar

import mlx.core as mx

from kernels.attention.page_tables import RowIndex
from kernels.lanes.base import LaneShape, Pair, StepInputs, store_tokens
from kernels.lanes.identity import IdentityLanes
from turbocache.cache.batch import CacheBatch
from turbocache.cache.pool import PagePool
from turbocache.cache.ring import RingConfig
from turbocache.cache.spec import CacheSpec, CompressedLayer
from turbocache.cache.steps import DecodeStep


class _Integers(IdentityLanes):
    """Lanes that take a step as integers, like the fused ones."""

    steps: ClassVar[list[RowIndex]] = []

    def attend_step(self, step: StepInputs) -> tuple[mx.array, Pair]:
        mx.eval(step.rows.rows, step.rows.table)
        self.steps.append(step.rows)
        return step.queries, store_tokens(step.tokens, step.raw, step.rows)


def test_a_decode_step_is_planned_once_and_masks_are_never_built_for_lanes_that_take_integers() -> None:
    """Also the page table and the slots of the raw buffers are shared, by layers and (the table) by steps."""
    lanes = _Integers(LaneShape(4, 2, 16, 16, 16, 16), mx.float32)
    layers = (CompressedLayer(lanes, mx.float32),) * 2
    batch = CacheBatch(CacheSpec(RingConfig(4, 0, 100), PagePool([lanes] * 2, 9), layers), 2)
    batch.prepare([90, 70])
    step = batch.begin_step(90)
    for layer in range(2):
        batch.prefill(layer, step, mx.ones((2, 2, 90, 16)), mx.ones((2, 2, 90, 16)))  # type: ignore[arg-type]
    batch.finalize()
    for _ in range(2):
        step = batch.begin_step(1)
        assert isinstance(step, DecodeStep)
        token = mx.ones((2, 2, 1, 16))
        for layer in range(2):
            tokens = batch.decode(layer, step, token, token)
            batch.attend_decode(layer, step, tokens, mx.ones((2, 4, 1, 16)), 0.1, None)
        assert step.rows.slots(token.shape) is step.rows.slots(token.shape)
    one, _, two, _ = lanes.steps
    assert one.offsets == (90, 70)
    assert two.offsets == (91, 71)
    assert one.table is two.table
    for rows in lanes.steps:
        assert not any("mask" in name or "raw" in name or "seen" in name for name in vars(rows))
    assert one is lanes.steps[1]
