"""The kernels by themselves, on random tensors of LLaVA-1.5's attention: `python examples/one_layer.py`."""

import torch

from eah_kernels import eah_attention, select_head, shared_map_attention, sink_statistics

torch.manual_seed(0)
query, key, value = (torch.randn(1, 32, 648, 128) for _ in range(3))  # (B, heads, tokens, head dim)
image_mask = torch.zeros(1, 648, dtype=torch.bool)  # (B, tokens): where the image is
image_mask[:, 35:611] = True

output, head, sink_counts = eah_attention(query, key, value, image_mask, threshold=0.002)
print(f"head {head.item()} lends its map: {sink_counts.max().item()} of {image_mask.sum().item()} are sinks")

# The same in its parts, for whoever wants to look at them or to choose otherwise.
statistics = sink_statistics(query, key, image_mask, threshold=0.002, return_column_mean=True)
chosen = select_head(statistics.sink_counts, image_mask)
again = shared_map_attention(query, key, value, chosen)
print(f"in parts: head {chosen.item()}, largest difference {(output - again).abs().max().item():.1e}")
most = statistics.column_mean[0, chosen.item()].topk(3)
print("most attended image tokens:", most.indices.tolist(), [f"{mean:.4f}" for mean in most.values.tolist()])
