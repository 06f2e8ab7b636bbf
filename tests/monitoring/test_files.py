"""deploy/ and docs/ against the code: no name that nobody exports, none that nobody shows, nothing out of date."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.monitoring.names import (
    DASHBOARD,
    PROMETHEUS,
    ROOT,
    exported,
    names_in,
    panels,
    recorded,
    rules,
    variables,
)

_PAGES = sorted(path for path in ROOT.glob("docs/**/*.md"))
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")


def used() -> dict[str, set[str]]:
    """Names by where they are used."""
    found = {f"rule {rule.get('record') or rule['alert']}": names_in(rule["expr"]) for rule in rules()}
    for title, query in panels():
        found.setdefault(f"panel {title}", set()).update(names_in(query))
    return found | {f"variable {name}": names_in(query) for name, query in variables().items()}


def test_what_deploy_asks_for_is_exported_or_recorded() -> None:
    known = exported() | recorded()
    assert {where: missing for where, names in used().items() if (missing := names - known)} == {}


def test_what_is_exported_is_shown_or_watched() -> None:
    assert exported() - set().union(*used().values()) == set()


def test_what_documents_name_is_exported_or_recorded() -> None:
    known = exported() | recorded()
    wrong = {}
    for page in [*_PAGES, ROOT / "README.md"]:
        if missing := names_in(page.read_text()) - known:
            wrong[page.name] = missing
    assert wrong == {}


def test_the_dashboard_is_made_by_its_generator() -> None:
    script = f"import runpy; print(runpy.run_path({str(ROOT / 'deploy/grafana/generate.py')!r})['build'](), end='')"
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert made == DASHBOARD.read_text(), "run: python deploy/grafana/generate.py"


def test_every_alert_says_what_to_do_and_the_runbook_says_more() -> None:
    runbook = (ROOT / "docs" / "monitoring.md").read_text()
    sections = set(re.findall(r"^### (\w+)$", runbook, re.MULTILINE))
    alerts = [rule for rule in rules() if "alert" in rule]
    assert sections == {alert["alert"] for alert in alerts}
    for alert in alerts:
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}, alert["alert"]
        assert alert["annotations"]["runbook"].endswith(f"docs/monitoring.md#{alert['alert'].lower()}")
        assert alert["labels"]["severity"] in ("critical", "warning", "info")


@promtool
def test_promtool_takes_the_configuration() -> None:
    subprocess.run(["promtool", "check", "config", PROMETHEUS / "prometheus.yml"], check=True, capture_output=True)


@promtool
def test_every_alert_fires_and_resolves() -> None:
    tests = ROOT / "tests" / "monitoring" / "alerts.yml"
    done = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = set(re.findall(r'alertname="(\w+)", alertstate="firing"\}\'', tests.read_text()))
    assert tested == {rule["alert"] for rule in rules() if "alert" in rule}
