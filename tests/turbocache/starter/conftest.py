"""A tiny SmolLM as llama.cpp would write it into a GGUF file, and the model and tokenizer that it was made from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

N_HEADS, N_KV_HEADS, HIDDEN, EPS, THETA = 6, 2, 192, 1e-5, 100000.0
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "The miller's 365 sacks weigh 1,250 kg; naïve façade, 名前 🙂.\n\tdef f(x):\n    return x ** 2\n" * 3
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class Source:
    """What a file is made from."""

    model: Module
    tokenizer: Tokenizer

    @property
    def tokens(self) -> list[str]:
        vocabulary = self.tokenizer.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    def tensors(self) -> dict[str, mx.array]:
        """All arrays by llama.cpp's names and in its order of rows."""
        found = {}
        for name, value in cast(list[tuple[str, mx.array]], tree_flatten(self.model.parameters())):
            part, array = name.rsplit(".", 1)
            layer = ""
            if part.startswith("model.layers."):
                _, _, number, part = part.split(".", 3)
                layer = f"blk.{number}."
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                n = N_HEADS if part == "self_attn.q_proj" else N_KV_HEADS
                # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
                value = value.reshape(n, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            found[f"{layer}{_NAMES[part]}.{array}"] = mx.contiguous(value)
        return found

    def metadata(self) -> dict[str, Any]:
        config = self.model.args
        numbers = {
            "llama.embedding_length": config.hidden_size,
            "llama.feed_forward_length": config.intermediate_size,
            "llama.block_count": config.num_hidden_layers,
            "llama.attention.head_count": N_HEADS,
            "llama.attention.head_count_kv": N_KV_HEADS,
            "llama.context_length": 512,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }
        floats = {"llama.attention.layer_norm_rms_epsilon": EPS, "llama.rope.freq_base": THETA}
        types = [3 if token in SPECIAL else 1 for token in self.tokens]
        return {
            "general.architecture": "llama",
            "general.license": "apache-2.0",
            "general.organization": "Someone",
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.chat_template": TEMPLATE,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": mx.array(types, dtype=mx.int32),
            "tokenizer.ggml.merges": [
                " ".join(pair) for pair in json.loads(self.tokenizer.to_str())["model"]["merges"]
            ],
            **{name: mx.array(value, dtype=mx.uint32) for name, value in numbers.items()},
            **{name: mx.array(value, dtype=mx.float32) for name, value in floats.items()},
        }

    def save(self, file: Path) -> None:
        mx.save_gguf(str(file), self.tensors(), self.metadata())


@pytest.fixture(scope="session")
def source() -> Source:
    """Two layers of random weights that float16 holds, and a trained byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = in_bytes
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    # Trained without it, so that there are merges of digits which it must prevent.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), in_bytes])
    assert any(token.lstrip("Ġ").isdecimal() and len(token) > 2 for token in tokenizer.get_vocab())
    mx.random.seed(11)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            intermediate_size=256,
            num_attention_heads=N_HEADS,
            num_key_value_heads=N_KV_HEADS,
            rms_norm_eps=EPS,
            rope_theta=THETA,
            vocab_size=tokenizer.get_vocab_size(),
            tie_word_embeddings=True,
        )
    )
    drawn = tree_map(lambda x: mx.random.normal(x.shape) * 0.2, model.parameters())
    model.update(tree_map(lambda x: x.astype(mx.float16).astype(mx.float32), drawn))
    mx.eval(model.parameters())
    return Source(model, tokenizer)
