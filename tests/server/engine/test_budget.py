import threading

import pytest

from server.engine.budget import Budget
from server.errors import OutOfMemory


def test_promises_stay_within_the_total_and_a_refusal_sets_nothing_aside() -> None:
    budget = Budget(total=100, cost=lambda n: 10 * n)
    budget.promise("a", 6)
    with pytest.raises(OutOfMemory, match="not promised"):
        budget.promise("b", 5)
    assert budget.promised == 60
    budget.promise("b", 4)
    budget.release("a")
    budget.release("a")
    assert budget.promised == 40


def test_a_request_larger_than_everything_is_told_what_to_change() -> None:
    budget = Budget(total=100, cost=lambda n: 10 * n)
    with pytest.raises(OutOfMemory, match="TURBOCACHE_KV_MEMORY") as caught:
        budget.promise("a", 11)
    assert caught.value.retry_after


def test_a_promise_grows_only_into_what_is_free() -> None:
    budget = Budget(total=100, cost=lambda n: 10 * n)
    budget.promise("a", 3)
    budget.promise("b", 5)
    assert budget.extend("a", 5)
    assert not budget.extend("a", 6)
    assert budget.promised == 100


def test_threads_never_promise_more_than_there_is() -> None:
    budget = Budget(total=1000, cost=lambda n: n)
    accepted: list[str] = []

    def ask(name: str) -> None:
        for i in range(100):
            try:
                budget.promise(f"{name}-{i}", 3)
            except OutOfMemory:
                continue
            accepted.append(f"{name}-{i}")

    threads = [threading.Thread(target=ask, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(accepted) == 333
    assert budget.promised == 999
