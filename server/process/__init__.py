"""The server as a process: signals, supervisor, sockets, event loop."""
