"""One decoding step as a CUDA graph, in the place of `torch.compile` where `generate` decodes with a static cache.

What is unusual: nothing is compiled. A step launches some 1,500 kernels, which takes three times as long as they run;
recorded once, by its second call, and replayed afterwards, it costs what its kernels cost, for any length of video and
any new one at once. The first call is a plain one, and so is every call that a recording does not fit: inputs of other
shapes, a text cache that was reordered, text or video on the CPU. A model with hooks, which a replay would pass over,
is not recorded at all.
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


_RECORDING = threading.Lock()  # threads that answer at the same time record on one stream


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

    @staticmethod
    def is_watched(model: nn.Module) -> bool:
        """Whether modules have hooks, other than those that transformers leaves to collect outputs."""
        hooks = (
            hook
            for module in model.modules()
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        )
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
        return hasattr(cache, "video_key_values")  # a `VideoMemory`, which the first call may not have yet

    def _places(self, cache: Cache) -> tuple:
        """Where the kernels of a recording find text and video, and how rows of one read rows of the other."""
        ends = (0, len(cache.layers) - 1)  # what moves one layer moves them all
        text = [cache.layers[end].keys.data_ptr() for end in ends if cache.layers[end].is_initialized]
        video = [cache.level(end).keys_BHMP.data_ptr() for end in ends if cache.video_length]
        rows = None if cache.video_rows is None else tuple(cache.video_rows)
        return (*text, *video, cache.video_length, rows, cache.keys_are(rotated=True))

    def _can_be_recorded(self, cache: Cache, tensors: list[Tensor]) -> bool:
        """Whether inputs, text and video are read where they lie, without a copy from the CPU."""
        if cache.offloading or not all(t.is_cuda for t in tensors):
            return False
        if not cache.video_length:
            return True
        in_order = cache.video_rows is None or repeats_in_order(cache.video_rows, cache.num_video_rows)
        return in_order and cache.level(0).keys_BHMP.is_cuda

    def _step(self, cache: Cache, inputs: dict) -> Any:
        """What is recorded."""
        return self.forward(past_key_values=cache, **inputs)

    def _replay(self, cache: Cache) -> Any:
        """The outputs with tensors of their own, and the cache itself."""
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
        """Records a step on `device`, which need not be the current one."""
        graph, stream = torch.cuda.CUDAGraph(), side_stream(device, "record")  # cuBLAS keeps a workspace for each
        with _RECORDING:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                # torch.cuda.graph() would first collect garbage and return all free memory to the driver
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._outputs = step()
                except Exception as error:
                    with contextlib.suppress(RuntimeError):  # what was recorded so far is of no use
                        graph.capture_end()
                    raise RuntimeError(
                        f"A decoding step cannot be recorded as a CUDA graph ({error}): a hook or adapter may wait for "
                        "the GPU. Pass disable_compile=True to generate."
                    ) from error
                graph.capture_end()
            torch.cuda.current_stream(device).wait_stream(stream)
        return graph


class GraphedStateDecoding(GraphedDecoding):
    """The same for a `StateMemory`, whose states the recording reads and writes in buffers of its own.

    The memory is given these buffers for its states: a step costs the same whatever was read before. What else a
    memory counts, a replay counts on.
    """

    def _takes(self, cache: Cache | None, inputs: dict) -> bool:
        """One token for every row, after a first; padding (`attention_mask`) is a matter of plain steps."""
        ids, is_state = inputs.get("input_ids"), hasattr(cache, "text_tokens_B")
        single = ids is not None and ids.shape[1] == 1 and inputs.get("attention_mask") is None
        return is_state and single and cache.is_initialized and not cache.is_ragged

    def _places(self, cache: Cache) -> tuple:
        return (cache.batch_size,)

    def _can_be_recorded(self, cache: Cache, tensors: list[Tensor]) -> bool:
        return all(t.is_cuda for t in (*tensors, *cache.states[0]))

    def _record(self, leaves: list, structure: pytree.TreeSpec, cache: Cache) -> None:
        shadow = cache.fork()  # counts what is recorded; `cache` counts what is replayed
        self._states = shadow.states = [type(state)(*map(torch.clone, state)) for state in cache.states]
        super()._record(leaves, structure, shadow)

    def _step(self, cache: Cache, inputs: dict) -> Any:
        cache.states = list(self._states)  # whose places the new ones take
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
    for into, come in zip(zip(*targets), zip(*sources)):  # convolutions, then scans: a launch takes one dtype
        torch._foreach_copy_(into, come)
