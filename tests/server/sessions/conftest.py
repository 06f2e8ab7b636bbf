"""The fixtures of tests/server/engine: sessions are tested in a running engine."""

from tests.server.engine.conftest import engine, loaded_once, start

__all__ = ["engine", "loaded_once", "start"]
