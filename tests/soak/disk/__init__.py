"""Session files: servers killed while they write, and damaged files."""
