"""Prometheus and Grafana in containers: what they are told is there, and nobody reaches them from elsewhere."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.installing import ROOT

DEPLOY = ROOT / "deploy"


class ComposeLoader(yaml.SafeLoader):
    """YAML with Compose's `!reset`, which takes away what the file before has said: None here."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)


def services(*names: str) -> dict[str, dict[str, Any]]:
    """The services of compose files, later ones over earlier ones, by the few of Compose's rules that they use."""
    merged: dict[str, dict[str, Any]] = {}
    for name in names:
        for service, entries in yaml.load((DEPLOY / name).read_text(), ComposeLoader)["services"].items():
            known = merged.setdefault(service, {})
            for key, value in entries.items():
                known[key] = {**known.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


BASE = services("compose.yaml")
LINUX = services("compose.yaml", "compose.linux.yaml")


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """Where folders of the repository are seen in the container."""
    parts = [volume.split(":") for volume in service["volumes"]]
    return {target: DEPLOY / source for source, target, *_ in parts if source.startswith(".")}


def test_every_mounted_path_exists_and_is_mounted_to_be_read() -> None:
    for service in BASE.values():
        assert all(path.is_dir() for path in mounts(service).values()), mounts(service)
        assert all(volume.endswith(":ro") for volume in service["volumes"] if volume.startswith("."))


def test_named_volumes_are_declared() -> None:
    declared = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["volumes"]
    used = {volume.split(":")[0] for service in BASE.values() for volume in service["volumes"]} - set(declared)
    assert all(name.startswith(".") for name in used)


@pytest.mark.parametrize("name", list(BASE))
def test_images_are_pinned_and_containers_may_do_little(name: str) -> None:
    assert re.search(r":v?\d+\.\d+\.\d+$", BASE[name]["image"])
    assert (BASE[name]["read_only"], BASE[name]["cap_drop"]) == (True, ["ALL"])
    assert BASE[name]["security_opt"] == ["no-new-privileges:true"]


def test_only_this_machine_can_open_them() -> None:
    for service in BASE.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    for service in LINUX.values():
        assert (service["network_mode"], service["ports"]) == ("host", None)
    assert LINUX["prometheus"]["environment"]["LISTEN"].startswith("127.0.0.1:")
    assert LINUX["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("service", "server"), [(BASE["prometheus"], "host.docker.internal"), (LINUX["prometheus"], "127.0.0.1")]
)
def test_prometheus_scrapes_the_machine_that_serves(service: dict[str, Any], server: str, tmp_path: Path) -> None:
    """The container's own command line, with the repository's files and a Prometheus that says how it was started."""
    (script,) = service["command"]
    config = tmp_path / "tmp"
    config.mkdir()
    script = script.replace("$$", "$").replace("/tmp/", f"{config}/")
    script = script.replace("/etc/turbocache", str(mounts(service)["/etc/turbocache"]))
    fake = tmp_path / "prometheus"
    fake.write_text('#!/bin/sh\necho "$*"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        [*service["entrypoint"], script],
        env={**service["environment"], "PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (
        f"--config.file={config}/prometheus.yml --web.listen-address={service['environment']['LISTEN']}" in done.stdout
    )
    read = yaml.safe_load((config / "prometheus.yml").read_text())
    targets = [target for job in read["scrape_configs"] for one in job["static_configs"] for target in one["targets"]]
    assert targets == [f"{server}:8000"]
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "config", str(config / "prometheus.yml")], check=True, capture_output=True)


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "$PROMETHEUS_URL")
    assert BASE["grafana"]["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
    assert LINUX["grafana"]["environment"]["PROMETHEUS_URL"] == f"http://{LINUX['prometheus']['environment']['LISTEN']}"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/turbocache.yml").read_text())["providers"]
    folder = Path(provider["options"]["path"])
    home = Path(BASE["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == folder
    assert (mounts(BASE["grafana"])[str(folder)] / home.name).is_file()
