"""Many clients and random operations against one server."""
