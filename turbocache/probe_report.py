"""The probe's result as text for a terminal."""

from kernels.probe.verdict import Backend, Check


def probe_report(backend: Backend) -> str:
    """Device and profile, every check with error and time, what each kind of layer uses, the backend and the reason."""
    width = max((len(check.name) for check in backend.checks), default=0)
    lines = [f"device   {backend.device}", f"profile  {backend.profile} ({backend.profile_reason})", ""]
    lines += [_line(check, width) for check in backend.checks]
    lines += [""] * bool(backend.checks)
    for verdict in backend.layers:
        parts = f", {' and '.join(verdict.expanded)} over expanded pages" if verdict.expanded else ""
        why = f": {verdict.reason}" if verdict.reason else ""
        lines.append(f"layers   {verdict.use}: {verdict.lanes}{parts}{why}")
    lines += [f"backend  {backend.name} (asked for: {backend.requested})", f"reason   {backend.reason}"]
    return "\n".join(lines)


def _line(check: Check, width: int) -> str:
    error = "" if check.max_error is None else f"error {check.max_error:.1e}"
    time = "" if check.microseconds is None else f"{check.microseconds:,.0f} us"
    return (
        f"{'ok' if check.passed else 'no'}  {check.name:{width}}  {error:13}  {time:>12}  {check.reason or ''}".rstrip()
    )
