"""Converts a llama in a GGUF file into a folder that mlx-lm loads. Quantised weights stay quantised.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. MLX reads Q4_0, Q4_1 and Q8_0 as weights, scales and
biases of its affine quantisation, in groups of 32. Other types become float16 when MLX loads the file.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_GROUP = 32
_CONTROL = 3
"""GGUF's type of tokens such as `<|im_end|>`."""

_SAMPLING = {"do_sample": False, "temperature": 0.0, "frequency_penalty": 0.2}
"""Greedy answers are the best of so small a model in 4 bits, and may loop. The penalty ends the loops."""

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class ConversionError(Exception):
    """The file is not of the kind that can be converted. The message says what it is."""


def convert(file: Path, folder: Path) -> dict[str, Any]:
    """Write the model in `file` into the empty `folder`. Returns the file's metadata, scalars as Python's.

    Raises ConversionError for another architecture or tokenizer, RuntimeError if MLX can't read the file, and OSError.
    """
    loaded = mx.load(str(file), format="gguf", return_metadata=True)
    tensors, metadata = cast(tuple[dict[str, mx.array], dict[str, Any]], loaded)
    said: dict[str, Any] = {
        key: value.tolist() if isinstance(value, mx.array) else value for key, value in metadata.items()
    }
    kind = [said.get(f"{key}") for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")]
    if kind != ["llama", "gpt2", "smollm"]:
        raise ConversionError(f"its architecture, tokenizer and pre-tokenizer are {kind}, not a SmolLM's")
    weights = _weights(tensors, said["llama.attention.head_count"], said["llama.attention.head_count_kv"])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    _write_json(folder / "config.json", _config(said, weights))
    _write_json(folder / "generation_config.json", _special_tokens(said) | _SAMPLING)
    _tokenizer(said).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(said))
    (folder / "chat_template.jinja").write_text(said["tokenizer.chat_template"], encoding="utf-8")
    return said


def _weights(tensors: Mapping[str, mx.array], n_heads: int, n_kv_heads: int) -> dict[str, mx.array]:
    """By mlx-lm's names; floats as float16, which is the type of the scales."""
    weights = {}
    for name, value in tensors.items():
        part, array = name.rsplit(".", 1)
        if part.startswith("blk."):
            _, layer, part = part.split(".")
            renamed = f"model.layers.{layer}.{_IN_LAYER[part]}"
        else:
            renamed = _OUTSIDE[part]
        if heads := {"attn_q": n_heads, "attn_k": n_kv_heads}.get(part):
            value = _halves_apart(value, heads)
        weights[f"{renamed}.{array}"] = value.astype(mx.float16) if mx.issubdtype(value.dtype, mx.floating) else value
    return weights


def _halves_apart(rows: mx.array, n_heads: int) -> mx.array:
    """Undo llama.cpp's order of rows. RoPE turns pairs of rows of a head: there each row and the next, in mlx-lm row i
    of a head's first half and row i of its second. `rows` is `[n_heads * head_dim, any]`, packed weights, scales or
    biases.
    """
    by_pairs = rows.reshape(n_heads, -1, 2, rows.shape[1])
    return by_pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(said: Mapping[str, Any], weights: Mapping[str, mx.array]) -> dict[str, Any]:
    n_heads, hidden = said["llama.attention.head_count"], said["llama.embedding_length"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": said["llama.feed_forward_length"],
        "num_hidden_layers": said["llama.block_count"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": said["llama.attention.head_count_kv"],
        "head_dim": said.get("llama.attention.key_length", hidden // n_heads),
        "max_position_embeddings": said["llama.context_length"],
        # The file's float32, in as few digits as it needs.
        "rms_norm_eps": float(str(np.float32(said["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": said["llama.rope.freq_base"],
        "vocab_size": len(said["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float16",
        **_special_tokens(said),
    }
    return config | ({"quantization": quantization} if (quantization := _quantization(weights)) else {})


def _quantization(weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """As mlx-lm reads it: the bits of most layers, and by name those that have others. Empty if none is quantised."""
    bits = {
        name.removesuffix(".scales"): weights[name.replace(".scales", ".weight")].shape[1] // scales.shape[1]
        for name, scales in weights.items()
        if name.endswith(".scales")  # one scale for 32 weights, and 32 / bits weights in a word
    }
    if not bits:
        return {}
    ((usual, _),) = Counter(bits.values()).most_common(1)
    others = {name: {"group_size": _GROUP, "bits": n} for name, n in bits.items() if n != usual}
    return {"group_size": _GROUP, "bits": usual, **others}


def _special_tokens(said: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of tokens. The end of a text ends an answer too, in case that the model takes it for the end of its turn."""
    bos, eos, pad, unknown = (said[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "unknown"))
    return {"bos_token_id": bos, "eos_token_id": [eos, unknown], "pad_token_id": pad}


def _tokenizer(said: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE. Each digit is a token of its own."""
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [cast(tuple[str, str], tuple(merge.split(" "))) for merge in said["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, bytes_of_words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, type in zip(tokens, types, strict=True) if type == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def _tokenizer_config(said: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    tokens = said["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": said["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **{f"{ours}_token": tokens[said[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()},
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
