"""What is checked in compiled code: its cost, and its results when the CPU executes it."""
