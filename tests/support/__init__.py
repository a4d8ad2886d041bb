"""What tests share: cases, oracles, tiny models."""
