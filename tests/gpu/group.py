"""Two ranks on two GPUs over NCCL against one process on one of them: `python -m tests.gpu.group`.

Real servers: answers, decoding speed, bytes. Needs two NVIDIA GPUs, and nothing that only the tests' environment has.
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from prometheus_client.parser import text_string_to_metric_families

from tests.group.models import CONFIG, GAIN, SEED, write
from tests.processes import child

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
SMALL = "small, float32"
START_SECONDS = 420.0
"""A first start compiles kernels."""
LARGE = {
    **CONFIG,
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
"""The geometry of an 8B model but for its vocabulary, which is the bundled tokenizer's."""
LENGTHS = (4_000, 32_000)
SENTENCE_TOKENS = 11.2
DECODED = 256
TURNS = 3
SMALL_GAIN = 0.3
"""Of 36 layers: with more, rounding in bfloat16 grows to where two ways to compute the same are not the same."""
GO_ON = {"0": -100, "2": -100}
"""Without the tokens that end an answer."""


def write_large(folder: Path, config: dict[str, Any]) -> Path:
    """Random bfloat16 weights, a file for each layer, so that no more than one layer is in memory at once."""
    write(folder)  # the other files
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(SEED)
    files: dict[str, dict[str, mx.array]] = {}
    parameters: Any = tree_flatten(qwen3.Model(qwen3.ModelArgs.from_dict(config)).parameters())
    for name, weight in parameters:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(part, {})[name] = weight
    for part in list(files):
        weights = {
            name: (
                mx.random.normal(w.shape) * (GAIN if part == "rest" else SMALL_GAIN) / w.shape[-1] ** 0.5
                if w.ndim == 2
                else w
            ).astype(mx.bfloat16)
            for name, w in files.pop(part).items()
        }
        mx.save_safetensors(str(folder / f"model-{part}.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def text(n_tokens: int, seed: int) -> str:
    """Plain sentences of about so many tokens."""
    draw = random.Random(seed)
    people, places = ["miller", "teacher", "sailor", "painter"], ["river", "mill", "harbour", "garden", "market"]
    return " ".join(
        f"The {draw.choice(people)} walked to the {draw.choice(places)} near the {draw.choice(places)}."
        for _ in range(round(n_tokens / SENTENCE_TOKENS))
    )


@dataclass
class Answer:
    """One streamed answer. Times are seconds since it was asked."""

    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return float((self.usage["completion_tokens"] - 1) / (self.times[-1] - self.times[0]))


@dataclass(frozen=True)
class Running:
    """A server's processes, rank 0 first; `url` is rank 0's."""

    url: str
    ranks: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def said(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in self.logs)

    def ask(self, name: str, prompt: str, n: int, logprobs: bool = False) -> Answer:
        """A greedy turn of `n` tokens."""
        asked, answer = time.perf_counter(), Answer()
        body = {
            "model": "default",
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": n,
            "logit_bias": GO_ON,
            "prompt_cache_key": name,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": logprobs,
        }
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=180) as response:
            for line in response.iter_lines():
                if response.is_error:
                    raise AssertionError(f"{response.status_code}: {line}")
                if not line.startswith("data: ") or line.endswith("[DONE]"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                answer.usage = chunk.get("usage") or answer.usage
                for choice in chunk.get("choices", []):
                    if choice["delta"].get("content"):
                        answer.times.append(time.perf_counter() - asked)
                    for token in (choice.get("logprobs") or {}).get("content") or []:
                        answer.tokens.append(token["token"])
                        answer.logprobs.append(token["logprob"])
        if len(answer.times) < 2 or not answer.usage:
            raise AssertionError(f"no answer to {name}:\n{self.said()}")
        return answer

    def metric(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=30).text)
            for sample in family.samples
            if sample.name == f"turbocache_{name}" and labels.items() <= sample.labels.items()
        )

    def wait_until_idle(self, seconds: float = 30.0) -> None:
        """Until nothing runs, and every rank has told its bytes since."""
        deadline = time.monotonic() + seconds
        while self.metric("requests_running") or self.metric("requests_waiting"):
            if time.monotonic() > deadline:
                raise AssertionError("what nobody waits for goes on")
            time.sleep(0.1)
        if len(self.ranks) > 1:
            time.sleep(2.5)  # ranks ask each other once a second

    def forget(self) -> None:
        """Delete all sessions, once nothing runs."""
        self.wait_until_idle()
        for row in httpx.get(f"{self.url}/v1/sessions", timeout=30).json()["data"]:
            httpx.delete(f"{self.url}/v1/sessions/{row['id']}", timeout=30).raise_for_status()


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(folder: Path, n: int, **settings: str) -> Iterator[Running]:
    """`n` ranks, rank i on GPU i and started as mlx.launch starts them with NCCL; stopped in order afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    http, nccl = free_port(), free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TURBOCACHE_", "MLX_"))}
    kept |= {f"TURBOCACHE_{name}": value for name, value in settings.items()} | {"HF_HUB_OFFLINE": "1"}
    # Float32 is to be float32: the answers of both sides are held against each other.
    kept |= {"MLX_ENABLE_TF32": "0"}
    logs = [folder / f"rank-{rank}.log" for rank in range(n)]
    serve = [sys.executable, "-m", "server.cli", "serve", "--host", LOOPBACK, "--port", str(http)]
    with ExitStack() as running:
        ranks = [
            running.enter_context(child(serve, log, cwd=ROOT, env=kept | _rank(i, n, nccl)))
            for i, log in enumerate(logs)
        ]
        server = Running(f"http://{LOOPBACK}:{http}", ranks, logs)
        try:
            began = time.monotonic()
            _wait_until_ready(server)
            print(f"  {n} rank(s) ready after {time.monotonic() - began:.0f} s", flush=True)
            yield server
            ranks[0].send_signal(signal.SIGTERM)
            ended = [rank.wait(60) for rank in ranks]
            if ended != [0] * n:
                raise AssertionError(f"ended with {ended}")
        except BaseException:
            print(server.said(), flush=True)
            raise


def _rank(i: int, n: int, nccl_port: int) -> dict[str, str]:
    """The environment of rank i, as mlx.launch sets it."""
    gpu = {"CUDA_VISIBLE_DEVICES": str(i)}
    if n == 1:
        return gpu
    return gpu | {
        "MLX_RANK": str(i),
        "MLX_WORLD_SIZE": str(n),
        "NCCL_HOST_IP": LOOPBACK,
        "NCCL_PORT": str(nccl_port),
    }


def _wait_until_ready(server: Running) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if any(rank.poll() is not None for rank in server.ranks):
            break
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError("the server did not start")


def answers(server: Running, n: int = 48) -> list[Answer]:
    """Turns alone, then four at once."""
    alone = [server.ask(f"alone-{size}", text(size, size), n, logprobs=True) for size in (30, 300, 2000)]
    with ThreadPoolExecutor(4) as pool:
        asked = pool.map(lambda i: server.ask(f"of-{i}", text(60 + 150 * i, i), n, logprobs=True), range(4))
        together = list(asked)
    server.forget()
    return alone + together


def equal_tokens(one: Sequence[Answer], many: Sequence[Answer]) -> dict[str, Any]:
    """How far the answers are the same; the largest difference of log-probabilities is over what is the same."""
    before, total, apart = [], 0, 0.0
    for a, b in zip(one, many, strict=True):
        if len(a.tokens) != len(b.tokens) or not a.tokens:
            raise AssertionError(f"answers of {len(a.tokens)} and {len(b.tokens)} tokens")
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))
        before.append(same)
        total += len(a.tokens)
        apart = max([apart, *(abs(x - y) for x, y in zip(a.logprobs[:same], b.logprobs[:same], strict=True))])
    return {"equal_before_the_first_difference": before, "share": sum(before) / total, "logprob_apart": apart}


def speeds(server: Running, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each length: one stream, the prompt read once and decoded from several times."""
    for n_tokens in lengths:
        server.ask(f"warm-{n_tokens}", text(n_tokens, n_tokens + 1), 16)  # plans and kernels of these shapes
        server.forget()
        turns = [server.ask(f"speed-{n_tokens}", text(n_tokens, n_tokens), DECODED) for _ in range(TURNS)]
        server.wait_until_idle()
        ranks = [str(rank) for rank in range(len(server.ranks))]
        read = turns[0].usage["prompt_tokens"]
        yield {
            "prompt": read,
            "first_token_s": turns[0].times[0],
            "prefill_tokens_s": read / turns[0].times[0],
            "decode_tokens_s": statistics.median(turn.tokens_per_second for turn in turns),
            "decode_runs": [round(turn.tokens_per_second, 1) for turn in turns],
            "cache_bytes": [int(server.metric("cache_bytes", rank=rank)) for rank in ranks],
            "fp16_bytes": [int(server.metric("cache_fp16_bytes", rank=rank)) for rank in ranks],
            "device_active": [int(server.metric("device_memory_bytes", rank=rank, kind="active")) for rank in ranks],
            "device_peak": [int(server.metric("device_memory_bytes", rank=rank, kind="peak")) for rank in ranks],
            "gpu_used_mib": gpu_memory(),
        }
        server.forget()


def mlx_lm_decode(folder: Path, model: Path, n: int, n_tokens: int) -> float:
    """Tokens a second of mlx-lm's own generation with its own cache, sharded in the same way."""
    nccl, kept = free_port(), {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    command = [sys.executable, "-m", "tests.gpu.sharded", str(model), str(n_tokens), str(DECODED)]
    with ExitStack() as running:
        ranks = [
            running.enter_context(
                child(command, cwd=ROOT, env=kept | _rank(i, n, nccl), stdout=subprocess.PIPE, text=True)
            )
            for i in range(n)
        ]
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    return float(outputs[0].split()[-1])


def gpu_memory() -> list[int]:
    """MiB in use on each GPU of the machine, by the driver."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.check_output(asked, text=True).split()]


def compare(name: str, model: Path, folder: Path, lengths: Sequence[int], **settings: str) -> dict[str, Any]:
    """One process, then two ranks, on the same model."""
    told: dict[int, list[Answer]] = {}
    rows: dict[int, list[dict[str, Any]]] = {}
    for n in (1, 2):
        print(f"{name}, {n} rank(s)", flush=True)
        with serving(folder / f"{name}-{n}", n, MODEL=str(model), **settings) as server:
            told[n] = answers(server)
            rows[n] = []
            for row in speeds(server, lengths):
                rows[n].append(row)
                print(" ", {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            started = [line for line in server.said().splitlines() if " backend " in line or "watched at" in line]
        print("  " + "\n  ".join(started))
        for length in lengths if name != SMALL else ():
            rows[n][lengths.index(length)]["mlx_lm_tokens_s"] = native = mlx_lm_decode(folder, model, n, length)
            print(f"  mlx-lm's own generation, {n} rank(s), {length} tokens: {native:.1f} tokens/s", flush=True)
    result = {"name": name, "answers": equal_tokens(told[1], told[2]), "one": rows[1], "two": rows[2]}
    print(" ", result["answers"], flush=True)
    return result


def table(result: dict[str, Any]) -> Iterator[str]:
    yield "| prompt | measure | one process | two ranks | two / one |"
    yield "|---:|---|---:|---:|---:|"
    for one, two in zip(result["one"], result["two"], strict=True):
        for key in ("decode_tokens_s", "mlx_lm_tokens_s", "prefill_tokens_s"):
            if key not in one:
                continue
            yield f"| {one['prompt']} | {key} | {one[key]:.1f} | {two[key]:.1f} | {two[key] / one[key]:.2f} |"
        for key in ("cache_bytes", "device_active", "device_peak"):
            whole, shares = one[key][0], two[key]
            shown = ", ".join(f"{share / 2**20:.1f}" for share in shares)
            ratio = max(shares) / whole
            yield f"| {one['prompt']} | {key}, MiB a rank | {whole / 2**20:.1f} | {shown} | {ratio:.3f} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.group", description=__doc__)
    parser.add_argument("--only", default="small,large", help="models to serve")
    parser.add_argument("--folder", type=Path, help="where the models are written (16 GB); default: a temporary one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts, results = options.only.split(","), []
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if "small" in parts:
            small = compare(SMALL, write(folder / "small"), folder, (1000,), KV_MEMORY="1GiB")
            results.append(small)
        if "large" in parts:
            began = time.monotonic()
            large = write_large(folder / "large", LARGE)
            mx.clear_cache()
            print(f"8B geometry written after {time.monotonic() - began:.0f} s", flush=True)
            results.append(compare("8B geometry, bfloat16", large, folder, LENGTHS, KV_MEMORY="8GiB"))
    print(mx.device_info())
    for result in results:
        print(f"\n{result['name']}: {result['answers']}\n\n" + "\n".join(table(result)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0 if all(r["answers"]["share"] == 1 for r in results if "float32" in r["name"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
