"""A model that four ranks can share: the bundled one has two KV heads."""

import importlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from turbocache.models import BUNDLED

SEED = 11
GAIN = 1.5
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 16384,
    "max_position_embeddings": 8192,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "eos_token_id": [2, 0],
}


def write(folder: Path, kind: str = "qwen3") -> Path:
    """A `kind` of model on disk: random float32 weights, 8 heads over 4 KV heads, the bundled model's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "model_type": kind}
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(SEED)
    model = module.Model(module.ModelArgs.from_dict(config))
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    weights = {
        name: mx.random.normal(weight.shape) * GAIN / weight.shape[-1] ** 0.5 if weight.ndim == 2 else weight
        for name, weight in parameters.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder
