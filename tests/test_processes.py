"""A test that ends early leaves no process behind."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.processes import Deadline, alive, child, wait_for_end, wait_until

ROOT = Path(__file__).parents[1]
FAMILY = ["sh", "-c", "trap '' TERM; sleep 1000 & echo ready; sleep 1000; sleep 1000"]
"""A process with a child of its own that does not stop when asked to."""


def started(log: Path) -> None:
    wait_until(lambda: "ready" in log.read_text(), 10)


def test_whatever_a_block_raises_its_processes_are_gone(tmp_path: Path) -> None:
    def fail() -> None:
        with child(FAMILY, tmp_path / "log") as process:
            groups.append(process.pid)
            started(tmp_path / "log")
            raise KeyError

    groups: list[int] = []
    with pytest.raises(KeyError):
        fail()
    assert not alive(groups[0])


def test_what_the_first_process_has_left_is_killed_too(tmp_path: Path) -> None:
    with child(["sh", "-c", "sleep 1000 & echo ready"], tmp_path / "log") as process:
        assert wait_for_end(process, 10) == 0
        assert alive(process.pid)
    assert not alive(process.pid)


def test_a_stop_is_in_order_when_the_process_does_it(tmp_path: Path) -> None:
    with child(
        ["sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done"], tmp_path / "log", stop=True
    ) as process:
        started(tmp_path / "log")
    assert process.returncode == 3


def test_a_timed_out_test_leaves_no_process(tmp_path: Path) -> None:
    """pytest-timeout interrupts a test that waits in vain."""
    inner = tmp_path / "test_inner.py"
    inner.write_text(
        textwrap.dedent(f"""
        import time
        from pathlib import Path
        from tests.processes import child

        def test_waits():
            with child({FAMILY!r}, Path({str(tmp_path / "log")!r})) as process:
                Path({str(tmp_path / "group")!r}).write_text(str(process.pid))
                time.sleep(1000)

        def test_innocent():
            import gc
            gc.collect()
    """)
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pytest_timeout", "-p", "no:cacheprovider", "--timeout", "3"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(inner)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Timeout" in done.stdout, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert not alive(int((tmp_path / "group").read_text()))


def test_a_deadline_passes() -> None:
    deadline = Deadline(0.01)
    assert not Deadline(60).passed()
    time.sleep(0.1)
    assert deadline.passed()
    with pytest.raises(AssertionError, match="no luck"):
        wait_until(lambda: False, 0.01, "no luck")
    with child(["sleep", "1000"]) as process, pytest.raises(subprocess.TimeoutExpired):
        wait_for_end(process, 0.01)
