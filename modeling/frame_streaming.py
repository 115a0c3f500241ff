"""Frames on their way to the model: copied to the GPU beside its work, as many as fit at once.

What is unusual: a stream of its own copies and prepares the next chunk (`load_ahead`) while the model computes the
present one, and the model does not know. A chunk is loaded only when the one before the last is computed, so two chunks
of patches are held however far the CPU runs ahead. Decoding beside the model is `vamba.video.read_ahead`'s.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


Item = TypeVar("Item")

# More frames at once bring no speed. 64 frame pairs are a multiple of 64 tokens, which is what the scan's tiles hold.
MAX_CHUNK_FRAMES = 128


def load_ahead(
    items: Iterable[Item], load: Callable[[Item], Iterable[Any]], device: torch.device
) -> Iterator[tuple[Item, Any]]:
    """(item, load(item)) for each item; on a GPU loaded while the consumer's work on the item before is computed.

    Args:
        load: makes tensors on `device` of an item. On a GPU it runs on a stream of its own, for which the consumer's
            current stream waits; tensors it only hands through must be ready before.
    """
    if device.type != "cuda":
        for item in items:
            yield item, load(item)
        return
    before_last = last = None  # when the consumer's work on the items before was computed
    for item in items:
        if before_last is not None:
            before_last.synchronize()
        with torch.cuda.stream(_loading_stream(device)):
            loaded = load(item)
        consumer = torch.cuda.current_stream(device)
        consumer.wait_stream(_loading_stream(device))
        for tensor in loaded:
            if tensor.is_cuda:  # its memory goes back to the loading stream, but not before the consumer is done
                tensor.record_stream(consumer)
        yield item, loaded
        before_last, last = last, torch.cuda.Event(blocking=True)
        last.record(torch.cuda.current_stream(device))


@functools.cache
def _loading_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each GPU and for good, as the allocator keeps what was freed apart by stream."""
    return torch.cuda.Stream(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the CPU to a GPU through page-locked memory, without waiting for the copy."""
    if device.type == "meta":  # where accelerate keeps the weights elsewhere it also moves the inputs
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu" and not torch.is_grad_enabled():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def normalized(patches: Tensor, config: PreTrainedConfig) -> Tensor:
    """Patches of dtype uint8 (`do_rescale=False, do_normalize=False`) as the processor would have made them, float32.

    Args:
        patches: (number of patches, channels * temporal patch size * patch size ** 2); floats are returned as they are.
        config: a `VambaConfig`, for `image_mean` and `image_std`.
    """
    if patches.dtype != torch.uint8:
        return patches
    mean, std = (
        (torch.tensor(per_channel).unsqueeze(1) * 255.0).to(patches.device, non_blocking=True)
        for per_channel in (config.image_mean, config.image_std)
    )
    return patches.float().unflatten(1, (len(mean), -1)).sub_(mean).div_(std).flatten(1)


def default_chunk_frames(model: PreTrainedModel, patches: int) -> int:
    """Frames to encode at once: `MAX_CHUNK_FRAMES`, or as many as fit into half of the free memory of the fullest GPU.

    Args:
        patches: of one temporal patch (a pair of frames), of all rows together.
    """
    temporal = model.config.vision_config.temporal_patch_size
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    if not devices:
        return MAX_CHUNK_FRAMES
    needed = patches * activation_bytes(model.config, model.dtype)
    fitting = min(map(free_bytes, devices)) // max(1, 2 * needed)
    return temporal * max(1, min(MAX_CHUNK_FRAMES // temporal, fitting))


def free_bytes(device: torch.device) -> int:
    """What could still be allocated on a GPU: what its driver has, and what PyTorch holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def activation_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """About how many bytes a patch takes at most while vision tower and Mamba-2 blocks work on it (no gradients)."""
    vision, mamba, size = config.vision_config, config.mamba_config, dtype.itemsize
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    # the residual stream and its norm, then either the MLP and its activation or queries and keys rotated in float32
    tower = numbers * (4 + size) + 2 * width * size + max(4 * inner * size, 4 * width * size + 6 * width * 4)
    # residual, norm and result; in_proj, convolution, scan and gated norm; the scan's states in float32
    projected = mamba.intermediate_size + mamba.conv_dim + mamba.num_heads
    token = (3 * mamba.hidden_size + projected + mamba.conv_dim + 2 * mamba.intermediate_size) * size
    token += 4 * mamba.intermediate_size * mamba.state_size // mamba.chunk_size
    return max(tower, token // vision.spatial_merge_size**2)
