"""EAH in vLLM, against `eah.enable` in transformers. Engines run in processes of their own, one each."""
