import sys

import mlx.core as mx
import pytest

from turbocache.machine.memory import available_memory, device_memory, keep_freed_memory


def test_what_is_available_is_part_of_what_there_is() -> None:
    assert 0 < available_memory() <= device_memory()


@pytest.mark.skipif(sys.platform != "linux" or mx.default_device().type != mx.cpu, reason="for Linux's CPU backend")
def test_the_c_library_takes_the_advice() -> None:
    assert keep_freed_memory()
