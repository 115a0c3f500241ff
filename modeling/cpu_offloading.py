"""What autograd saves, kept in CPU memory between forward and backward, and moved while the GPU computes.

What is unusual: backward wants things in the reverse of the order in which they were saved, so what it asks for brings
along what was saved before it. Copies in both directions run on a stream of their own; the tensors they read or make
are marked for the allocator, which would otherwise hand out their memory while a copy is under way.
"""

import contextlib
import functools
import weakref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class offload_saved(saved_tensors_hooks):  # noqa: N801, a context manager like its base
    """Within, autograd keeps the given tensors (and their views) in CPU memory between forward and backward.

    Of all that is saved only these are moved, so that weights stay where they are. A tensor whose values are copied
    before they are saved, as keys that a kernel wants repeated or in another layout, is not recognised and stays.
    They must not be changed in place, as a copy may still be under way. What was brought along and is not asked for, as
    by a backward through a part of the graph, stays on the GPU until the graph is gone.
    """

    def __init__(self, *tensors: Tensor | None):
        storages = {t.untyped_storage().data_ptr() for t in tensors if t is not None}

        def pack(tensor: Tensor):
            return _OnCPU(tensor) if tensor.untyped_storage().data_ptr() in storages else tensor

        def unpack(saved):
            return saved.load() if isinstance(saved, _OnCPU) else saved

        super().__init__(pack, unpack)


class _OnCPU:
    """A copy of a tensor in pinned memory, in pieces: PyTorch rounds a pinned allocation up to a power of two."""

    piece_bytes = 64 * 2**20
    ahead_bytes = 512 * 2**20  # of what was saved before, to be brought along
    _newest: dict[torch.device, weakref.ref] = {}

    @torch.no_grad()
    def __init__(self, tensor: Tensor):
        # Strides are kept, for in backward an operation goes the way that it went in forward; gaps are not.
        self.like = torch.empty_like(tensor, device="meta")
        self.device, self.pieces = tensor.device, []
        self._loaded, self._arriving = False, None
        dense = tensor if tensor.stride() == self.like.stride() else tensor.clone()  # as empty_like lays it out
        with _beside(self.device, wait=True) as stream:
            for part in self._flat(dense):
                piece = torch.empty_like(part, device="cpu", pin_memory=tensor.is_cuda)
                self.pieces.append(piece.copy_(part, non_blocking=True))
        if stream is not None:
            dense.record_stream(stream)
        self._before = self._newest.get(self.device, lambda: None)
        self._newest[self.device] = weakref.ref(self)

    def load(self) -> Tensor:
        """The tensor on its device, for the current stream."""
        tensor, arrived = self._arriving or self._fetch()
        self._loaded, self._arriving = True, None
        self._bring_along()
        if arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrived)
            tensor.record_stream(stream)
        return tensor

    def _bring_along(self) -> None:
        before, room = self._before(), self.ahead_bytes
        while before is not None and room > 0:
            if not before._loaded:
                before._arriving = before._arriving or before._fetch()
                room -= before.like.nbytes
            before = before._before()

    @torch.no_grad()
    def _fetch(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy under way, in memory of the copying stream, and the event that it has arrived."""
        with _beside(self.device) as stream:
            tensor = torch.empty_like(self.like, device=self.device)
            for part, piece in zip(self._flat(tensor), self.pieces):
                part.copy_(piece, non_blocking=True)
            return tensor, None if stream is None else stream.record_event()

    def _flat(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensor's numbers as they lie in memory, in pieces."""
        return tensor.as_strided((tensor.numel(),), (1,)).split(self.piece_bytes // tensor.itemsize)


@contextlib.contextmanager
def _beside(device: torch.device, wait: bool = False):
    """On a GPU, within, its copying stream, after all that the current one was given so far if it is to `wait`."""
    if device.type != "cuda":
        yield None
        return
    stream = copying_stream(device)
    if wait:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream


@functools.cache
def copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each GPU and for good, as the allocator keeps what was freed apart by stream."""
    return torch.cuda.Stream(device)


__all__ = ["copying_stream", "offload_saved"]
