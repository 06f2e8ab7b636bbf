"""The process of one measurement: one request on standard input, one JSON line on standard output.

    {"settings": ..., "task": "survey"}                                        the machine, model and backends
    {"settings": ..., "task": "case", "contender": ..., "context": ..., "backend": ...}  one run's figures

The answer is `{"found": ...}`, or `{"failed": REASON}` after an exception.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from kernels.attention.device import on_cpu
from kernels.probe.verdict import Backend, LayerVerdict
from turbocache.backend import BackendUnavailable, choose_backend, layer_uses
from turbocache.benchmark.contenders import Contender, contenders
from turbocache.benchmark.measure import measure
from turbocache.benchmark.settings import Settings
from turbocache.benchmark.subject import Subject, make_subject
from turbocache.documents import machine, versions
from turbocache.machine import blas
from turbocache.machine.memory import device_memory, keep_freed_memory
from turbocache.mlxlm.plan import LayerPlan, plan_layers
from turbocache.presets import Preset
from turbocache.store import checked_plans

_BACKEND = ("name", "requested", "reason", "profile", "device")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request. Raises any error of the model and its caches."""
    settings = Settings.from_json(request["settings"])
    keep_freed_memory()  # as in the server, for all contenders
    chosen = contenders(settings)
    if request["task"] == "survey":
        return survey(make_subject(settings), chosen, settings)
    contender = next(c for c in chosen if c.name == request["contender"])
    if contender.preset is None:
        return measure(make_subject(settings, lambda _: []), contender, request["context"], settings, None)
    # Plans that passed the survey's check are not checked again.
    subject = make_subject(settings, plan_layers if request["backend"]["layer_kinds"] else checked_plans)
    backend = backend_from(request["backend"], subject.plans, contender.preset)
    return measure(subject, contender, request["context"], settings, backend)


def survey(subject: Subject, chosen: Sequence[Contender], settings: Settings) -> dict[str, Any]:
    """The machine, the model, and one probe for each contender of this project, used by all its cases."""
    return {
        "machine": {**machine(), "memory_bytes": device_memory()},
        "versions": versions(),
        "blas": blas.prefer_fast().name if on_cpu() else None,
        "model": subject.as_json(),
        "backends": {c.name: _probe(c, subject.plans, settings) for c in chosen if c.ours},
    }


def _probe(contender: Contender, plans: Sequence[LayerPlan], settings: Settings) -> dict[str, Any]:
    assert contender.preset is not None
    try:
        chosen = choose_backend(contender.backend or settings.backend, plans, contender.preset)
    except (ValueError, BackendUnavailable) as error:
        return {"unavailable": str(error)}
    backend = chosen.as_json()
    return {name: backend[name] for name in (*_BACKEND, "layer_kinds")}


def backend_from(survey: dict[str, Any], plans: Sequence[LayerPlan], preset: Preset) -> Backend:
    """The backend that the survey chose for a preset."""
    kinds = {kind["layers"]: kind for kind in survey["layer_kinds"]}
    uses = dict.fromkeys(layer_uses(plans, preset)) if kinds else ()
    layers = [
        LayerVerdict(use, kinds[str(use)]["lanes"], tuple(kinds[str(use)]["expanded"]), kinds[str(use)]["reason"])
        for use in uses
    ]
    plain: dict[str, Any] = {name: survey[name] for name in _BACKEND}
    return Backend(**plain, layers=tuple(layers))


def main() -> int:
    request = json.load(sys.stdin)
    # Output of libraries goes to standard error. Standard output has only the answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        result: dict[str, Any] = {"found": answer(request)}
    except Exception as error:  # mlx-lm and models may raise anything: it is the row's reason
        result = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
