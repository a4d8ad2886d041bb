"""What is timed; run from the repository's root, as in `python -m bench.attention`."""
