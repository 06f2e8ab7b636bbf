"""A conversation several times longer than a session may hold."""

import httpx
import pytest

from server.sessions.checkpoints import MOST
from tests.serving.launch import Server, digits, filler


@pytest.mark.slow
def test_a_long_conversation_goes_on_in_flat_memory_and_keeps_its_sink(small_server: Server) -> None:
    client = small_server.client()
    messages = [{"role": "user", "content": "My name is Anna and my locker code is 5917."}]
    sizes, rotations, positions = [], [], []
    # The fact lies in the 64 sink tokens, everything after it rotates out.
    for turn in range(10):
        last = turn == 9
        raw = client.chat.completions.with_raw_response.create(
            model="default", messages=messages, temperature=0, max_tokens=30, extra_body={"prompt_cache_key": "long"}
        )
        answer, row = raw.parse(), small_server.sessions()["long"]
        assert row["tokens_held"] == row["tokens_seen"] - row["dropped_tokens"] <= 512
        assert row["tokens_held"] > 512 - 300 or row["tokens_seen"] < 512  # turns go whole, and no more of them
        told = int(raw.headers.get("x-turbocache-dropped-tokens", 0))
        assert 0 <= row["dropped_tokens"] - told <= 300
        assert int(raw.headers.get("x-turbocache-dropped-turns", 0)) <= row["dropped_turns"] < turn + 1
        sizes.append(small_server.cache_bytes())
        rotations.append(small_server.metric("rotations_total"))
        positions.append(row["tokens_seen"])
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
        question = "What is my locker code?" if turn == 8 else "Please read this: " + filler(30, turn)
        messages.append({"role": "user", "content": question})
        if last:
            assert digits(messages[-2]["content"]) == "5917"
    assert positions[-1] > 4 * 512
    held = [size for size, seen in zip(sizes, positions, strict=True) if seen > 1024]
    assert len(held) >= 5
    # How full the ring is when a turn ends, and older pages that checkpoints have, each at most a ring's five.
    page = httpx.get(f"{small_server.url}/v1/status").json()["pages"]["nbytes"]
    assert max(held) - min(held) <= page * (1 + MOST * 5)
    assert rotations == sorted(rotations)
    assert rotations[-1] >= (positions[-1] - 512 - 64) // 64
    rotated = small_server.metric("rotated_tokens_total")
    assert rotated == 64 * rotations[-1]
