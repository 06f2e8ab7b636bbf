"""mlx-lm's own generation, sharded over the ranks that a launcher has started: tokens a second, for comparison."""

import statistics
import sys
import time
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step

from turbocache.machine.launched import is_launched


def main() -> None:
    """`python -m tests.gpu.sharded MODEL PROMPT_TOKENS ANSWER_TOKENS` on each rank."""
    path, n_prompt, n_answer = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = cast(Any, load(path, lazy=True))[0]
    if is_launched():
        model.shard(mx.distributed.init(strict=True))
    mx.eval(model.parameters())
    prompt = mx.array([1000 + i % 5000 for i in range(n_prompt)])
    times = [time.perf_counter() for _ in generate_step(prompt, model, max_tokens=n_answer)]
    print(1 / statistics.median(b - a for a, b in pairwise(times[8:])))


if __name__ == "__main__":
    main()
