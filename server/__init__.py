"""The server: HTTP, the engine's thread, sessions and metrics."""
