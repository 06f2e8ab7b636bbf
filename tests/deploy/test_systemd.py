"""The units that the install targets put in place are what systemd takes, and say what a stop needs."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from server.settings import KNOWN_NAMES, Settings
from tests.deploy.installing import COMMAND, ROOT, Home, home

EXAMPLE = ROOT / "deploy" / "environment.example"
analyzed = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is on Linux only")


@pytest.fixture
def linux(tmp_path: Path) -> Home:
    return home(tmp_path, "Linux")


def unit(linux: Home) -> Path:
    return linux.path / ".config/systemd/user/turbocache.service"


def entries(path: Path) -> list[tuple[str, str]]:
    """NAME=value of a unit file, in order; comments and sections aside."""
    lines = (line.partition("=") for line in path.read_text().splitlines() if not line.startswith(("#", "[")))
    return [(name, value) for name, equals, value in lines if equals]


def analyze(folder: Path, *arguments: str) -> str:
    """What systemd-analyze says; it takes drop-ins beside the unit. Raises AssertionError where it finds anything."""
    environment = os.environ | {"XDG_RUNTIME_DIR": str(folder), "SYSTEMD_COLORS": "0"}
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def exposure(report: str) -> float:
    match = re.search(r"exposure level for turbocache.service: ([0-9.]+)", report)
    assert match is not None, report
    return float(match[1])


def test_a_user_gets_a_unit_that_starts_now_and_at_every_login(linux: Home) -> None:
    said = linux.make("install-service", "ACCEL=cpu").stdout
    assert [call for call in linux.calls() if not call.startswith("systemd-run")] == [
        "systemctl --user daemon-reload",
        "systemctl --user daemon-reload",
        "systemctl --user enable turbocache.service",
        "systemctl --user reset-failed turbocache.service",
        "systemctl --user restart turbocache.service",
    ]
    values = dict(entries(unit(linux)))
    assert values["ExecStart"] == f"{COMMAND} serve --host ${{HOST}} --port ${{PORT}}"
    assert values["EnvironmentFile"] == f"-{linux.settings}"
    assert "@" not in re.sub("@system-service|~@privileged", "", "".join(values.values()))
    for folder in (linux.state, linux.path / ".cache/turbocache"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for step in (str(linux.settings), "journalctl --user -u turbocache", "loginctl enable-linger"):
        assert step in said


def test_a_second_time_changes_nothing_and_keeps_what_was_edited(linux: Home) -> None:
    linux.make("install-service", "ACCEL=cpu")
    assert stat.S_IMODE(linux.settings.stat().st_mode) == 0o600
    before = unit(linux).read_bytes()
    linux.settings.write_text("PORT=9000\n")
    assert linux.make("install-service", "ACCEL=cpu").returncode == 0
    assert (unit(linux).read_bytes(), linux.settings.read_text()) == (before, "PORT=9000\n")


def test_without_namespaces_the_sandbox_is_left_out_and_that_is_said(linux: Home) -> None:
    """A unit with PrivateUsers= would not start there."""
    sandbox = unit(linux).with_name("turbocache.service.d") / "10-sandbox.conf"
    linux.make("install-service", "ACCEL=cpu")
    assert ("ReadWritePaths", f"{linux.state} {linux.path}/.cache/turbocache -%h/.cache/huggingface") in entries(
        sandbox
    )
    linux.answers("systemd-run", 1)
    assert "gives your user no namespace" in linux.make("install-service", "ACCEL=cpu").stdout
    assert not sandbox.exists()
    assert not {"PrivateUsers", "ProtectSystem", "PrivateTmp"} & set(dict(entries(unit(linux))))


def test_a_gpu_gets_its_devices_behind_the_sandbox(linux: Home) -> None:
    folder = unit(linux).with_name("turbocache.service.d")
    linux.make("install-service", "ACCEL=cuda")
    both = sorted(folder.iterdir())
    assert [path.name for path in both] == ["10-sandbox.conf", "20-nvidia.conf"]
    assert dict(entries(both[0]))["PrivateDevices"] == "yes"
    assert dict(entries(both[1]))["PrivateDevices"] == "no"
    linux.make("install-service", "ACCEL=cpu")
    assert [path.name for path in folder.iterdir()] == ["10-sandbox.conf"]


def test_uninstalling_leaves_settings_sessions_and_what_others_wrote(linux: Home) -> None:
    linux.make("install-service", "ACCEL=cpu")
    theirs = unit(linux).with_name("turbocache.service.d") / "override.conf"
    theirs.write_text("[Service]\nMemoryMax=8G\n")
    linux.calls()
    for _ in range(2):  # what is not there is no error
        assert linux.make("uninstall-service", "ACCEL=cpu").returncode == 0
        assert "systemctl --user disable --now turbocache.service" in linux.calls()
    left = {str(path.relative_to(linux.path)) for path in linux.path.rglob("*") if path.is_file()}
    assert left == {".config/turbocache/environment", ".config/systemd/user/turbocache.service.d/override.conf"}
    assert linux.state.is_dir()


def test_what_the_service_would_never_see_is_refused(linux: Home, tmp_path: Path) -> None:
    done = linux.make("install-service", "ACCEL=cpu", "PORT=9000")
    assert done.returncode != 0
    assert f"Put PORT=9000 into {linux.settings}" in done.stdout
    done = linux.make("install-service", "ACCEL=cpu", command=tmp_path / "my models" / "turbocache")
    assert done.returncode != 0
    assert "can't be installed for this path" in done.stdout
    linux.answers("systemctl", 1)
    done = linux.make("install-service", "ACCEL=cpu")
    assert done.returncode != 0
    assert "log in as that user" in done.stdout
    assert not unit(linux).exists()


@analyzed
def test_systemd_takes_the_units(linux: Home, tmp_path: Path) -> None:
    linux.make("install-service", "ACCEL=cuda")
    analyze(tmp_path, "--user", "verify", "--man=no", str(unit(linux)))
    root = tmp_path / "root"
    assert linux.make("install-system-service", "ACCEL=cuda", f"DESTDIR={root}").returncode == 0
    analyze(tmp_path, "verify", "--man=no", str(root / "etc/systemd/system/turbocache.service"))
    # It reads drop-ins too, or the lines above prove less than they seem to.
    drop_in = root / "etc/systemd/system/turbocache.service.d/20-nvidia.conf"
    drop_in.write_text("[Service]\nPrivateDevices=perhaps\n")
    with pytest.raises(AssertionError, match="perhaps"):
        analyze(tmp_path, "verify", "--man=no", str(root / "etc/systemd/system/turbocache.service"))


@analyzed
def test_what_an_intruder_could_do(linux: Home, tmp_path: Path) -> None:
    """systemd's own figure, from 0 (nothing) to 10 (everything)."""
    root = tmp_path / "root"
    linux.make("install-system-service", "ACCEL=cpu", f"DESTDIR={root}")
    system = root / "etc/systemd/system/turbocache.service"
    assert exposure(analyze(tmp_path, "security", "--offline=true", "--no-pager", str(system))) <= 1.3
    # It reads a single file, so the drop-in goes behind the unit.
    linux.make("install-service", "ACCEL=cpu")
    whole = tmp_path / "turbocache.service"
    parts = [unit(linux), unit(linux).with_name("turbocache.service.d") / "10-sandbox.conf"]
    whole.write_text("".join(part.read_text() for part in parts))
    assert exposure(analyze(tmp_path, "security", "--offline=true", "--no-pager", str(whole))) <= 2.1


def test_the_systems_service_goes_below_destdir_and_starts_nothing(linux: Home, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for _ in range(2):
        assert linux.make("install-system-service", "ACCEL=cpu", f"DESTDIR={root}").returncode == 0
        (root / "etc/turbocache/environment").write_text("PORT=9000\n")
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {"etc/systemd/system/turbocache.service", "etc/turbocache/environment"}
    linux.make("uninstall-system-service", "ACCEL=cpu", f"DESTDIR={root}")
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["environment"]
    assert (linux.calls(), (root / "etc/turbocache/environment").read_text()) == ([], "PORT=9000\n")


@pytest.mark.parametrize("template", ["turbocache.service", "user/turbocache.service"])
def test_a_stop_has_time_for_open_requests_and_all_sessions(template: str) -> None:
    values = dict(entries(ROOT / "deploy/systemd" / template))
    grace = Settings.model_fields["stop_grace"].default
    # A user's manager has 120 s for all its services when the machine goes down.
    assert grace + 100 <= int(values["TimeoutStopSec"]) <= (120 if template.startswith("user/") else 180)
    assert values["KillMode"] == "mixed"


def test_the_file_of_settings_names_settings_and_changes_nothing_by_itself() -> None:
    lines = EXAMPLE.read_text().splitlines()
    assert all(line.startswith("#") for line in lines if line)
    names = [line[1:].partition("=")[0] for line in lines if re.match("#[A-Z_]+=", line)]
    assert names[:2] == ["HOST", "PORT"]
    assert {name for name in names if name.startswith("TURBOCACHE_")} <= KNOWN_NAMES


@analyzed
def test_systemd_takes_the_unit_as_a_rank_of_a_group(linux: Home, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert linux.make("install-system-service", "ACCEL=cpu", f"DESTDIR={root}").returncode == 0
    system = root / "etc/systemd/system/turbocache.service"
    drop_in = system.with_name("turbocache.service.d") / "30-rank.conf"
    drop_in.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "deploy/systemd/30-rank.conf", drop_in)
    analyze(tmp_path, "verify", "--man=no", str(system))
    values = dict(entries(drop_in))
    # The ranks find out by themselves before the watchdog acts on the one that does nothing.
    assert Settings.model_fields["rank_timeout"].default * 2 <= int(values["WatchdogSec"])
    drop_in.write_text(drop_in.read_text().replace("WatchdogSec=15", "WatchdogSec=often"))
    with pytest.raises(AssertionError, match="often"):
        analyze(tmp_path, "verify", "--man=no", str(system))
