"""What is measured in the page, and rings to draw."""

import random
from typing import Any

# Of every text in sight: the ratio to what lies behind it, by WCAG's formula.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [x, y, z] = [r, g, b].map((v) => linear(v / 255));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const words = walker.currentNode.data.trim();
    if (!words || !node.checkVisibility() || node.matches(":disabled, noscript")) continue;
    const style = getComputedStyle(node);
    const text = luminance(rgba(node.namespaceURI.endsWith("svg") ? style.fill : style.color));
    const behind = luminance(ground(node));
    const [light, dark] = text > behind ? [text, behind] : [behind, text];
    found[words.slice(0, 40)] = (light + 0.05) / (dark + 0.05);
  }
  return found;
}"""

SMALL = """() => [...document.querySelectorAll("button, summary, input, textarea")]
  .filter((node) => node.checkVisibility() && node.getBoundingClientRect().height < 44)
  .map((node) => node.outerHTML.slice(0, 80))"""


def rings() -> list[dict[str, Any]]:
    """Rings as the engine has them: of all lengths, with and without rotation."""
    draw = random.Random(7)
    found = []
    for _ in range(400):
        keep = draw.choice([0, 4, 64])
        window = draw.choice([64, 128])
        size = draw.choice([None, 320, 512, 4096, 40_960])
        offset = draw.randint(0, draw.choice([40, 300, 2000, 100_000]))
        flushed = max(0, (offset - keep - window) // 64)
        pinned = min(flushed, draw.choice([0, 0, 1, 20]), 0 if size is None else (size - keep - window - 64) // 64)
        kept = keep + 64 * pinned
        first = 0 if size is None else max(0, (max(kept, offset + 1 - (size - kept)) - kept) // 64)
        first = min(first, flushed - pinned)
        raw = max(0, offset - keep - 64 * flushed)
        found.append(
            {
                "offset": offset, "sink_tokens": min(offset, keep), "first_page": first, "pages": flushed - first,
                "pinned_pages": pinned, "page_tokens": 64, "window_tokens": raw, "max_size": size,
            }
        )  # fmt: skip
    return found
