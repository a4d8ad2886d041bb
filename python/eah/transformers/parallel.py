"""Where a process's heads stand among all, under tensor parallelism."""

from __future__ import annotations

import torch.distributed
from torch import nn

from eah.method import HeadBlock


def head_block(module: nn.Module) -> HeadBlock | None:
    """The block of this process, or None where no weight of the module is sharded over one mesh.

    Every process computes a block of the layer's heads, in the order of the device mesh that the layer's weights are
    sharded over.
    """
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            sharded = [dim for dim, placement in enumerate(parameter.placements) if placement.is_shard()]
            if len(sharded) == 1:
                return HeadBlock(mesh.get_group(sharded[0]), mesh.get_local_rank(sharded[0]), mesh.size(sharded[0]))
    return None
