"""The agent that the install target puts in place on macOS, as far as a machine without launchd can tell."""

import os
import plistlib
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from server.settings import Settings
from tests.deploy.installing import Home, home

# Of launchd.plist(5), what the agent uses. plutil -lint checks that a file is a property list, and nothing of this.
TYPES: dict[str, type] = {
    "Label": str,
    "ProgramArguments": list,
    "EnvironmentVariables": dict,
    "WorkingDirectory": str,
    "RunAtLoad": bool,
    "KeepAlive": dict,
    "ThrottleInterval": int,
    "ProcessType": str,
    "ExitTimeOut": int,
    "SoftResourceLimits": dict,
    "Umask": int,
    "StandardOutPath": str,
    "StandardErrorPath": str,
}
ELEMENTS = {"plist", "dict", "array", "key", "string", "integer", "true", "false"}
LABEL = "io.github.turbocache"


@pytest.fixture
def mac(tmp_path: Path) -> Home:
    return home(tmp_path, "Darwin")


def agent(mac: Home) -> Path:
    return mac.path / "Library/LaunchAgents" / f"{LABEL}.plist"


def installed(mac: Home) -> dict[str, Any]:
    done = mac.make("install-service")
    assert done.returncode == 0, done.stdout
    return dict(plistlib.loads(agent(mac).read_bytes()))


def test_the_agent_is_a_property_list_of_launchds_keys(mac: Home) -> None:
    values = installed(mac)
    assert {name: type(value) for name, value in values.items()} == TYPES
    assert values["Label"] == agent(mac).stem
    assert values["ProcessType"] in {"Background", "Standard", "Adaptive", "Interactive"}
    assert values["KeepAlive"] == {"SuccessfulExit": False}
    assert values["SoftResourceLimits"] == {"NumberOfFiles": 4096, "Core": 0}
    assert values["Umask"] == 0o077
    assert all(type(value) is str for value in values["EnvironmentVariables"].values())
    text = agent(mac).read_text()
    assert '<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN"' in text
    assert "@" not in "".join(map(str, values.values()))
    # The DTD in a few words: its elements, a root with one child, and dicts of a key and a value by turns.
    root = ElementTree.fromstring(text)
    assert {element.tag for element in root.iter()} <= ELEMENTS
    assert (root.attrib, len(root)) == ({"version": "1.0"}, 1)
    for table in root.iter("dict"):
        assert {element.tag for element in table[::2]} == {"key"}
        assert "key" not in {element.tag for element in table[1::2]}
        names = [element.text for element in table[::2]]
        assert len(set(names)) == len(names) == len(table) / 2


@pytest.mark.skipif(shutil.which("plutil") is None, reason="plutil is on macOS only")
def test_plutil_takes_the_agent(mac: Home) -> None:
    installed(mac)
    subprocess.run(["plutil", "-lint", agent(mac)], check=True)


def test_the_settings_reach_the_server_and_so_does_the_stop(mac: Home, tmp_path: Path) -> None:
    """The agent's own command line, with a server that says how it was started: the shell has become it."""
    server = tmp_path / "server"
    server.write_text('#!/bin/sh\necho "$$ $* $TURBOCACHE_MODEL $TURBOCACHE_SESSION_DIR"\n')
    server.chmod(0o755)
    assert mac.make("install-service", command=server).returncode == 0
    values = plistlib.loads(agent(mac).read_bytes())

    def start() -> list[str]:
        process = subprocess.Popen(
            values["ProgramArguments"],
            env={"PATH": os.environ["PATH"], **values["EnvironmentVariables"]},
            cwd=values["WorkingDirectory"],
            stdout=subprocess.PIPE,
            text=True,
        )
        said = process.communicate(timeout=10)[0].split()
        assert (process.returncode, said.pop(0)) == (0, str(process.pid))
        return said

    sessions = f"{mac.state}/sessions"
    assert start() == ["serve", "--host", "127.0.0.1", "--port", "8000", sessions]
    mac.settings.write_text("# mine\nPORT=9000\nTURBOCACHE_MODEL='some/model'\n")
    assert start() == ["serve", "--host", "127.0.0.1", "--port", "9000", "some/model", sessions]
    mac.settings.unlink()
    assert start() == ["serve", "--host", "127.0.0.1", "--port", "8000", sessions]


def test_a_second_install_waits_for_the_first_service_to_end(mac: Home) -> None:
    domain = f"gui/{os.getuid()}"
    first = installed(mac)
    told = [call for call in mac.calls() if not call.startswith("launchctl print")]
    start = [f"launchctl enable {domain}/{LABEL}", f"launchctl bootstrap {domain} {agent(mac)}"]
    assert told == [f"launchctl bootout {domain}/{LABEL}", *start]
    mac.settings.write_text("PORT=9000\n")
    assert installed(mac) == first
    assert mac.settings.read_text() == "PORT=9000\n"
    assert mac.calls()[1:3] == [f"launchctl print {domain}/{LABEL}"] * 2


def test_uninstalling_leaves_settings_and_sessions(mac: Home) -> None:
    installed(mac)
    assert mac.make("uninstall-service").returncode == 0
    assert not (mac.tools / "calls.loaded").exists()
    left = {str(path.relative_to(mac.path)) for path in mac.path.rglob("*") if path.is_file()}
    assert left == {".config/turbocache/environment"}
    assert mac.state.is_dir()


def test_a_stop_has_time_for_open_requests_and_all_sessions(mac: Home) -> None:
    assert installed(mac)["ExitTimeOut"] >= Settings.model_fields["stop_grace"].default + 100
