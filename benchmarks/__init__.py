"""Speed and quality, each a command: `python -m benchmarks.NAME --json FILE`."""
