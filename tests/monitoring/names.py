"""What deploy/ asks Prometheus for, and under which names the code and the rules answer."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from server.metrics import Metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "turbocache.json"
RULES = (PROMETHEUS / "recording.yml", PROMETHEUS / "alerts.yml")

_NAME = re.compile(r"\b(?:turbocache[_:]|vllm:)[a-zA-Z0-9_:]+")
_SUFFIX = re.compile(r"_(bucket|sum|count)$")


def exported() -> set[str]:
    """Families of the code, as a query names them without a histogram's suffixes."""
    return {family.name for family in Metrics().families}


def rules() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def panels() -> Iterator[tuple[str, str]]:
    """Titles and queries of the dashboard, its variables' among them."""
    board = json.loads(DASHBOARD.read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def variables() -> dict[str, str]:
    """Queries of the dashboard's variables."""
    listed = json.loads(DASHBOARD.read_text())["templating"]["list"]
    return {one["name"]: one["query"] for one in listed if one["type"] == "query"}


def names_in(text: str) -> set[str]:
    """The metrics that a query or a page names."""
    histograms = {family.name for family in Metrics().families if family.type == "histogram"}
    found = set()
    for name in _NAME.findall(text):
        stem = _SUFFIX.sub("", name)
        found.add(stem if stem in histograms else name)
    return found
