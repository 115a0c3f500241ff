"""One decoding step as a CUDA graph, used instead of `torch.compile` where `generate` decodes with a static cache.

What is unusual: nothing is compiled. A step launches some 1,500 kernels, which takes three times as long as running
them. The second call of a step records it, and later calls replay the recording, which saves the launches at any
length of the video. The first call is a plain one, and so is every call that the recording does not fit: inputs of
other shapes, a text cache that was reordered, text or video on the CPU. A model with hooks is never recorded, as a
replay would not call them.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from .media import side_stream
from .video_memory import repeats_in_order


_RECORDING = threading.Lock()  # Threads that answer at the same time record on one stream.


class GraphedDecoding:
    """Calls `forward(**inputs)`, or replays its recording if that fits; the returned tensors are the caller's own."""

    def __init__(self, forward: Callable):
        self.forward = forward
        self._recorded_for: tuple | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: Any = None

    @staticmethod
    def suits(model: nn.Module) -> bool:
        """Whether the model is in evaluation mode with all of its weights on one GPU."""
        devices = {parameter.device for parameter in model.parameters()}
        return len(devices) == 1 and next(iter(devices)).type == "cuda" and not model.training

    @staticmethod
    def is_watched(model: nn.Module) -> bool:
        """Whether any module has hooks other than those with which transformers collects outputs."""
        by_id = (hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks))
        hooks = (hook for hooks in by_id for hook in hooks.values())
        return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)

    def __call__(self, **inputs: Any) -> Any:
        cache = inputs.pop("past_key_values", None)
        if not self._takes(cache, inputs):
            return self.forward(past_key_values=cache, **inputs)
        leaves, structure = pytree.tree_flatten(inputs)
        kinds = ((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        signature = (structure, *kinds, *self._places(cache))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if signature != self._recorded_for or not self._can_be_recorded(cache, tensors):
            self._recorded_for, self._graph, self._outputs = signature, None, None
            return self.forward(past_key_values=cache, **inputs)
        if self._graph is None:
            self._record(leaves, structure, cache)
        for static, t in zip(self._inputs, tensors):
            static.copy_(t, non_blocking=True)
        return self._replay(cache)

    def _takes(self, cache: Cache | None, inputs: dict) -> bool:
        return hasattr(cache, "video_key_values")  # The first call may come without a `VideoMemory`.

    def _places(self, cache: Cache) -> tuple:
        """Returns where a recording's kernels find text and video, and which rows of video the rows of text read."""
        ends = (0, len(cache.layers) - 1)  # Whatever moves one layer in memory moves the first or the last as well.
        text = [cache.layers[end].keys.data_ptr() for end in ends if cache.layers[end].is_initialized]
        video = [cache.level(end).keys_BHMP.data_ptr() for end in ends if cache.video_length]
        rows = None if cache.video_rows is None else tuple(cache.video_rows)
        return (*text, *video, cache.video_length, rows, cache.keys_are(rotated=True))

    def _can_be_recorded(self, cache: Cache, tensors: list[Tensor]) -> bool:
        """Whether inputs, text and video lie on the GPU and are read without being copied first."""
        if cache.offloading or not all(t.is_cuda for t in tensors):
            return False
        if not cache.video_length:
            return True
        in_order = cache.video_rows is None or repeats_in_order(cache.video_rows, cache.num_video_rows)
        return in_order and cache.level(0).keys_BHMP.is_cuda

    def _step(self, cache: Cache, inputs: dict) -> Any:
        return self.forward(past_key_values=cache, **inputs)

    def _replay(self, cache: Cache) -> Any:
        """Replays the recording; returns the cache itself, and copies of all other outputs."""
        self._graph.replay()
        fields = {
            name: value if isinstance(value, Cache) else pytree.tree_map_only(Tensor, torch.clone, value)
            for name, value in self._outputs.items()
        }
        return type(self._outputs)(**fields)

    def _record(self, leaves: list, structure: pytree.TreeSpec, cache: Cache) -> None:
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = pytree.tree_unflatten(leaves, structure)
        self._graph = self._capture(lambda: self._step(cache, inputs), self._inputs[0].device)

    def _capture(self, step: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
        """Records a step on `device`, which need not be the current device."""
        # One stream serves all recordings on a GPU, as cuBLAS keeps a workspace for each stream.
        graph, stream = torch.cuda.CUDAGraph(), side_stream(device, "record")
        with _RECORDING:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                # torch.cuda.graph() would first collect garbage and return all free memory to the driver.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._outputs = step()
                except Exception as error:
                    with contextlib.suppress(RuntimeError):  # Ending a failed recording raises an error of its own.
                        graph.capture_end()
                    raise RuntimeError(
                        f"A decoding step cannot be recorded as a CUDA graph ({error}), perhaps because a hook or an "
                        "adapter waits for the GPU. Pass disable_compile=True to generate."
                    ) from error
                graph.capture_end()
            torch.cuda.current_stream(device).wait_stream(stream)
        return graph


class GraphedStateDecoding(GraphedDecoding):
    """The same for a `StateMemory`, which is given the recording's buffers for its states.

    The recording updates these buffers in place. Whatever else a memory counts, each replay adds to (`note_step`).
    """

    def _takes(self, cache: Cache | None, inputs: dict) -> bool:
        """Whether this is a later step with one token for every row, without padding (`attention_mask`)."""
        ids, is_state = inputs.get("input_ids"), hasattr(cache, "text_tokens_B")
        single = ids is not None and ids.shape[1] == 1 and inputs.get("attention_mask") is None
        return is_state and single and cache.is_initialized and not cache.is_ragged

    def _places(self, cache: Cache) -> tuple:
        return (cache.batch_size,)

    def _can_be_recorded(self, cache: Cache, tensors: list[Tensor]) -> bool:
        return all(t.is_cuda for t in (*tensors, *cache.states[0]))

    def _record(self, leaves: list, structure: pytree.TreeSpec, cache: Cache) -> None:
        shadow = cache.fork()  # Recording counts a token in this one; replays count theirs in `cache`.
        self._states = shadow.states = [type(state)(*map(torch.clone, state)) for state in cache.states]
        super()._record(leaves, structure, shadow)

    def _step(self, cache: Cache, inputs: dict) -> Any:
        cache.states = list(self._states)
        outputs = super()._step(cache, inputs)
        _copy_states(self._states, cache.states)
        return outputs

    def _replay(self, cache: Cache) -> Any:
        if cache.states[0] is not self._states[0]:
            _copy_states(self._states, cache.states)
            cache.states, cache.is_written_into = list(self._states), True
        outputs = super()._replay(cache)
        cache.note_step()
        outputs.past_key_values = cache
        return outputs


def _copy_states(targets: list, sources: list) -> None:
    # All convolution states are copied at once, then all scan states, as one launch takes tensors of one dtype.
    for into, come in zip(zip(*targets), zip(*sources)):
        torch._foreach_copy_(into, come)
