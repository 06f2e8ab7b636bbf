"""HTTP and time: the wire, the engine thread, sessions and admission."""
