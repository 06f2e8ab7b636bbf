"""A session's cache as a file."""
