"""What the bundled model can talk about: it recalls facts and copies text."""

import time

from tests.processes import Deadline
from tests.serving.launch import Server, endless

TOLD = "My name is Anna and my locker code is 5917."
ASKED = "What is my locker code?"
CODE = "5917"
QUESTION = [
    {"role": "user", "content": TOLD},
    {"role": "assistant", "content": "Got it."},
    {"role": "user", "content": ASKED},
]
COPY = "crème brûlée 🙂 naïve"
# Without the tokens that end a turn the model talks on until somebody stops it.
ENDLESS = {
    "messages": [{"role": "user", "content": "Continue: the miller walked to the river."}],
    "logit_bias": endless("")["logit_bias"],
}
# For APIs that have no logit_bias: the model copies for some ten seconds.
LONG = "Repeat after me: " + "one two three four " * 100


def wait_for(server: Server, metric: str, value: float, seconds: float = 20, **labels: str) -> None:
    """Until a metric has this value: what a client does reaches the engine a moment later."""
    deadline = Deadline(seconds)
    while (found := server.metric(metric, **labels)) != value:
        assert not deadline.passed(), f"{metric} is {found}, not {value}"
        time.sleep(0.02)


def wait_until_idle(server: Server) -> None:
    """Nothing runs, waits or is owned by a request any more."""
    wait_for(server, "requests_running", 0)
    wait_for(server, "requests_waiting", 0)
    wait_for(server, "sessions", 0, state="running")
    assert server.metric("budget_bytes", kind="promised") == 0
