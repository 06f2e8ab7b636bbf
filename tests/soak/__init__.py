"""Long runs against chance: killed servers, damaged files, random operations. `python -m tests.soak --help`."""
