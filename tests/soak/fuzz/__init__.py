"""Random requests, bodies and JSON schemas."""
