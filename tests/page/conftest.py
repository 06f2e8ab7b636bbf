from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import pytest
from playwright.sync_api import Browser

from tests.page.browser import Visit, browser, chromium, visiting
from tests.serving.launch import Server, running

Visits = Callable[..., AbstractContextManager[Visit]]


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    """Not longer than a file: Playwright keeps an event loop running, beside which no other test could have one."""
    if (executable := chromium()) is None:
        pytest.skip("no Chromium: install one, or name it in TURBOCACHE_CHROMIUM")
    with browser(executable) as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose sessions hold 192 tokens."""
    with running(tmp_path_factory.mktemp("page"), MAX_SIZE="192", WINDOW="64", KV_MEMORY="64MiB") as process:
        yield process


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants an API key, on a GPU whose kernels do not compile."""
    command = ("uvicorn", "tests.page.faulty_app:app")
    with running(tmp_path_factory.mktemp("guarded"), command, API_KEYS="other,schlüssel", KV_MEMORY="64MiB") as process:
        yield process


@pytest.fixture
def visits(chrome: Browser, server: Server) -> Visits:
    """visits(**context) looks at the page of `server`."""
    return partial(visiting, chrome, server.url)
