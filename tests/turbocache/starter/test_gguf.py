"""turbocache.starter.gguf: what comes out is the model and the tokenizer that the file was made from."""

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm import load

from tests.turbocache.starter.conftest import TEMPLATE, TEXT, Source
from turbocache.starter import gguf
from turbocache.starter.gguf import ConversionError, convert

IDS = mx.array([[1, 17, 200, 5, 44, 2, 99, 130, 7, 61]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture
def file(tmp_path: Path, source: Source) -> Path:
    path = tmp_path / "tiny.gguf"
    source.save(path)
    return path


def logits(model: Any) -> np.ndarray:
    model.set_dtype(mx.float32)
    return np.array(model(IDS))


def test_logits_are_those_of_the_source(file: Path, folder: Path, source: Source) -> None:
    said = convert(file, folder)
    model, _ = load(str(folder))
    np.testing.assert_allclose(logits(model), logits(source.model), atol=1e-4)
    assert said["general.license"] == "apache-2.0"


def test_quantised_weights_stay_quantised(folder: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX reads a quantised tensor of a GGUF file as it would quantise one itself: weight, scales and biases."""
    quantised = Source(copy.deepcopy(source.model), source.tokenizer)
    quantised.model.set_dtype(mx.float16)
    nn.quantize(quantised.model, 32, 4, class_predicate=_but_embedding)
    nn.quantize(quantised.model, 32, 8)
    with monkeypatch.context() as patch:
        patch.setattr(gguf.mx, "load", lambda *_, **__: (quantised.tensors(), quantised.metadata()))
        convert(Path("read.gguf"), folder)
    model, _, config = load(str(folder), return_config=True)
    assert config["quantization"] == {
        "group_size": 32, "bits": 4, "model.embed_tokens": {"group_size": 32, "bits": 8},
    }  # fmt: skip
    assert model.layers[1].self_attn.k_proj.bits == 4
    np.testing.assert_allclose(logits(model), logits(quantised.model), atol=1e-4)


def _but_embedding(_: str, module: Any) -> bool:
    return hasattr(module, "to_quantized") and not isinstance(module, nn.Embedding)


def test_the_tokenizer_is_the_source_s(file: Path, folder: Path, source: Source) -> None:
    convert(file, folder)
    _, tokenizer = load(str(folder))
    for text in (TEXT, "<|im_start|>user\n12 and 3,456<|im_end|>\n", " ÿ\u0000é 1²½ 🙂‍↔️ \n\n\t", "unseen wörds 0x1F"):
        ids = tokenizer.encode(text)
        assert ids == source.tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_ids, tokenizer.eos_token, tokenizer.bos_token) == ({2, 0}, "<|im_end|>", "<|im_start|>")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n"
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE


def test_the_config_says_what_the_file_says(file: Path, folder: Path) -> None:
    convert(file, folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["max_position_embeddings"]) == (1e-5, 100000.0, 512)
    assert "quantization" not in config


@pytest.mark.parametrize(
    ("key", "value"),
    [("general.architecture", "qwen2"), ("tokenizer.ggml.model", "llama"), ("tokenizer.ggml.pre", "llama-bpe")],
)
def test_another_kind_of_file_is_refused(
    folder: Path, source: Source, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.setattr(gguf.mx, "load", lambda *_, **__: (source.tensors(), source.metadata() | {key: value}))
    with pytest.raises(ConversionError, match=value):
        convert(Path("other.gguf"), folder)
    assert list(folder.iterdir()) == []
