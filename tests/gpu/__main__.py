"""Correctness and speed of the fused kernels on this machine's GPU: `python -m tests.gpu`."""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.gpu import attention, correctness, end_to_end, generation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--only", default="correctness,generation,attention,end_to_end", help="parts to run")
    parser.add_argument("--every", type=int, default=1, help="check each N-th case only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = options.only.split(",")
    result: dict[str, Any] = {
        "device": mx.device_info(),
        "mlx": importlib.metadata.version("mlx"),
        "date": time.strftime("%Y-%m-%d"),
    }
    failed = 0
    checks = {
        "correctness": lambda: correctness.run_all(options.every),
        "generation": lambda: generation.run_all("metal" if mx.metal.is_available() else "cuda"),
    }
    for part in (part for part in checks if part in parts):
        result[part] = []
        for row in checks[part]():
            result[part].append(row)
            failed += not row["passed"]
            shown = {k: (f"{v:.2e}" if isinstance(v, float) else v) for k, v in row.items() if k != "passed"}
            print("ok  " if row["passed"] else "FAIL", shown, flush=True)
    if "attention" in parts:
        bandwidth = attention.copy_bandwidth()
        print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
        result["attention"] = [attention.run(case, bandwidth) for case in attention.CASES]
        for row in result["attention"]:
            print({k: (round(v, 2) if isinstance(v, float) else v) for k, v in row.items()})
    if "end_to_end" in parts:
        result["end_to_end"] = []
        for row in end_to_end.run():
            result["end_to_end"].append(row)
            print({k: (round(v, 3) if isinstance(v, float) else v) for k, v in row.items()}, flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, default=str))
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
