"""What a rank has of a model: its share, also while it loads."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.group.launch import LOOPBACK, environment, free_ports
from tests.group.models import write
from tests.processes import child, patient

pytestmark = pytest.mark.timeout(900)  # several processes, which share two cores in CI

LOAD = """
import turbocache, mlx.core as mx
from turbocache.mlxlm.group import join_group
from turbocache.mlxlm.model import load_model
import sys
load_model(sys.argv[1], join_group())
print(mx.get_active_memory(), mx.get_peak_memory())
"""


def test_a_rank_never_holds_the_whole_model(tmp_path: Path) -> None:
    model = write(tmp_path / "model")
    whole = (model / "model.safetensors").stat().st_size
    embedding = 16384 * 128 * 4  # each rank has all of it, and it is the largest part
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"{LOOPBACK}:{port}"] for port in free_ports(2)]))
    load = [sys.executable, "-c", LOAD, str(model)]
    shared = environment({}) | {"MLX_HOSTFILE": str(hosts)}
    with ExitStack() as running:
        ranks = [
            running.enter_context(child(load, env=shared | {"MLX_RANK": rank}, stdout=subprocess.PIPE, text=True))
            for rank in ("0", "1")
        ]
        for rank in ranks:
            active, peak = map(int, rank.communicate(timeout=patient(60))[0].split())
            share = embedding + (whole - embedding) / 2
            assert active <= 1.05 * share
            assert peak <= active + embedding / 4
