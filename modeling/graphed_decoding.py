"""One decoding step as a CUDA graph, in the place of `torch.compile` where `generate` decodes with a static cache.

What is unusual: nothing is compiled. A step launches some 1,500 kernels, which takes three times as long as they run;
recorded once, by its second call, and replayed afterwards, it costs what its kernels cost, for any length of video and
any new one at once. The first call is a plain one, and so is every call that a recording does not fit: inputs of other
shapes, a text cache that was reordered, a memory on the CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache


class GraphedDecoding:
    """Calls `forward(**inputs)` with tensors of the same shapes over and over, from its recording where one fits.

    What it returns is the caller's: copies of the recording's outputs.
    """

    def __init__(self, forward: Callable):
        self.forward = forward
        self._recorded_for: tuple | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: Any = None

    @staticmethod
    def suits(model: nn.Module) -> bool:
        """Whether all of the model is on one GPU and nothing in it may change from one step to the next."""
        devices = {parameter.device for parameter in model.parameters()}
        return len(devices) == 1 and next(iter(devices)).type == "cuda" and not model.training

    def __call__(self, **inputs: Any) -> Any:
        cache = inputs.pop("past_key_values", None)
        if not hasattr(cache, "video_key_values"):  # not (yet) a `VideoMemory`
            return self.forward(past_key_values=cache, **inputs)
        leaves, structure = pytree.tree_flatten(inputs)
        signature = (structure, *map(_describe, leaves), *_places(cache))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        fits = signature == self._recorded_for and all(t.is_cuda for t in tensors) and not _is_elsewhere(cache)
        if not fits:
            self._recorded_for, self._graph, self._outputs = signature, None, None
            return self.forward(past_key_values=cache, **inputs)
        if self._graph is None:
            self._record(leaves, structure, cache)
        for static, t in zip(self._inputs, tensors):
            static.copy_(t, non_blocking=True)
        self._graph.replay()
        return _copied(self._outputs)

    def _record(self, leaves: list, structure: pytree.TreeSpec, cache: Cache) -> None:
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = pytree.tree_unflatten(leaves, structure)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # torch.cuda.graph() would first collect garbage and return all free memory to the driver
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._outputs = self.forward(past_key_values=cache, **inputs)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = graph


def _describe(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _places(cache: Cache) -> tuple:
    """Where the kernels of a recording find text and video, and how rows of one read rows of the other."""
    ends = (0, len(cache.layers) - 1)  # what moves one layer moves them all
    text = [cache.layers[end].keys.data_ptr() for end in ends if cache.layers[end].is_initialized]
    video = [cache.level(end).keys_BHMP.data_ptr() for end in ends if cache.video_length]
    rows = None if cache.video_rows is None else tuple(cache.video_rows)
    return (*text, *video, cache.video_length, rows, cache.keys_are_rotated)


def _is_elsewhere(cache: Cache) -> bool:
    return bool(cache.video_length) and not cache.level(0).keys_BHMP.is_cuda


def _copied(outputs: Any) -> Any:
    """The outputs with tensors of their own, and the cache itself."""
    fields = {}
    for name, value in outputs.items():
        is_cache = isinstance(value, Cache)
        fields[name] = value if is_cache else pytree.tree_map_only(Tensor, torch.clone, value)
    return type(outputs)(**fields)
