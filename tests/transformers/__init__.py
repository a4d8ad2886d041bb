"""The swap in models of transformers, against oracles of its own."""
