"""Several ranks train one model: whatever their batches hold, they call every layer equally often.

What is unusual: where weights are sharded (FSDP2, DeepSpeed's ZeRO-3) each call of a layer gathers them from all ranks,
in forward and in backward. How often a rank calls the vision tower and the levels of the video depends on its batch:
the length of its videos, or no media at all. So before it calls them it asks for the most that any rank needs, and
makes up for what it has less with black frames, whose outputs are multiplied by zero. The cross-attention is called
once in every text layer then, whatever it reads. Under DDP nothing is gathered, but every parameter has to get a
gradient, so a batch without media runs one black frame there too.
"""

import torch
from torch import nn


def weights_are_sharded(module: nn.Module) -> bool:
    """Whether ranks hold parts of the weights and gather them for each call: FSDP2, or DeepSpeed's ZeRO-3."""
    if not _are_several():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in module.parameters())


def largest_of_ranks(numbers: list[int], device: torch.device) -> list[int]:
    """The largest that each number is on any rank; all ranks must ask."""
    found = torch.tensor(numbers, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found.tolist()


def calls_are_shared(module: nn.Module) -> bool:
    """Whether other ranks wait for this one to call the layers that its own batch does not need."""
    return weights_are_sharded(module) or _trains_beside_others(module)


def _trains_beside_others(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and _are_several()


def _are_several() -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1


def agree_on_calls(module: nn.Module, passes: list[int], device: torch.device) -> list[int]:
    """How often all ranks call the vision tower for each chunk of their media in one forward.

    Each gives what it needs itself, and gets what the rank needs that has most, for as many chunks as any has.
    """
    if weights_are_sharded(module):
        (chunks,) = largest_of_ranks([len(passes)], device)
        passes = largest_of_ranks([*passes, *[0] * (chunks - len(passes))], device) if chunks else []
    elif not any(passes) and _trains_beside_others(module):
        passes = [1, *passes[1:]]
    return passes
