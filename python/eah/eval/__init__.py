"""`eah eval`: benchmarks of hallucination on one's own weights and data, without and with EAH."""
