"""What a rank has of a model: its share, also while it loads."""

import json
import subprocess
import sys
from pathlib import Path

from tests.group.launch import LOOPBACK, environment, free_ports
from tests.group.models import write

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
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(model)],
            env=environment({}) | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        active, peak = map(int, rank.communicate(timeout=60)[0].split())
        share = embedding + (whole - embedding) / 2
        assert active <= 1.05 * share
        assert peak <= active + embedding / 4
