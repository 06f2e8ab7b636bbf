"""Geometries of real models with random weights: real speed and memory without a download, but no real text."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.base import Module
from mlx_lm.models import llama

MAX_POSITIONS = 1 << 20
_GROUP_SIZE = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """A llama's sizes."""

    like: str
    """The model with these sizes."""
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    tied: bool = False
    """Whether the head is the embedding."""
    vocabulary: int = 128256


SHAPES = {
    "1b": Shape("Llama-3.2-1B", 2048, 16, 32, 8, 64, 8192, tied=True),
    "3b": Shape("Llama-3.2-3B", 3072, 28, 24, 8, 128, 8192, tied=True),
    "8b": Shape("Llama-3.1-8B", 4096, 32, 32, 8, 128, 14336),
    "70b": Shape("Llama-3.1-70B", 8192, 80, 64, 8, 128, 28672),
}
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def random_model(shape: Shape, dtype: mx.Dtype, weight_bits: int | None = None) -> Module:
    """A llama with reproducible random weights. Made layer by layer: at most one is in full precision."""
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.n_layers,
            intermediate_size=shape.intermediate_size,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=1e-5,
            vocab_size=shape.vocabulary,
            rope_theta=500000.0,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=shape.tied,
        )
    )
    model.set_dtype(dtype)
    if weight_bits is not None:
        nn.quantize(model, _GROUP_SIZE, weight_bits)
    for layer in model.layers:
        mx.eval(layer.parameters())
    mx.eval(model.parameters())
    mx.clear_cache()
    return model
