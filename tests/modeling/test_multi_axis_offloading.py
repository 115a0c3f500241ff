"""Saved tensors in CPU memory: the same gradients, copies in the order in which backward wants them, memory freed."""

import gc
import weakref

import pytest
import torch

from vamba.modeling.multi_axis import _OnCPU, offload_saved


def chain(hidden: torch.Tensor, weights: torch.Tensor, offload: bool) -> torch.Tensor:
    """Each step saves what came before it, and its weights."""
    for weight in weights:
        with offload_saved(*([hidden] if offload else [])):
            hidden = (hidden * weight).sin()
    return hidden


def gradients(device: str, offload: bool, size: int = 40, steps: int = 12) -> list[torch.Tensor]:
    torch.manual_seed(0)
    leaves = [torch.randn(3, size).to(device).requires_grad_(), torch.randn(steps, 1, size).to(device).requires_grad_()]
    return torch.autograd.grad(chain(*leaves, offload).square().sum(), leaves)


@pytest.mark.parametrize("ahead", [0, 1, 500, 10**9])
def test_gradients_are_the_same(monkeypatch, ahead):
    monkeypatch.setattr(_OnCPU, "ahead_bytes", ahead)
    monkeypatch.setattr(_OnCPU, "piece_bytes", 64)  # in many pieces
    for ours, plain in zip(gradients("cpu", True), gradients("cpu", False)):
        assert torch.equal(ours, plain)


def test_what_was_saved_before_is_brought_along(monkeypatch):
    monkeypatch.setattr(_OnCPU, "ahead_bytes", 2 * 40)
    fetched, fetch = [], _OnCPU._fetch
    monkeypatch.setattr(_OnCPU, "_fetch", lambda self: (fetched.append(self), fetch(self))[1])
    saved = [_OnCPU(torch.full((10,), float(number))) for number in range(6)]
    for number, expected in ((5, [5, 4, 3]), (4, [2]), (0, [0]), (1, [1])):
        fetched.clear()
        assert torch.equal(saved[number].load(), torch.full((10,), float(number)))
        assert [saved.index(one) for one in fetched] == expected
    fetched.clear()
    assert torch.equal(saved[4].load(), torch.full((10,), 4.0))  # once more, as with retain_graph
    assert [saved.index(one) for one in fetched] == [4]  # the two before it are there, or were read already


def test_backward_may_come_twice():
    leaves = [torch.randn(3, 8, requires_grad=True), torch.randn(5, 1, 8, requires_grad=True)]
    total = chain(*leaves, offload=True).sum()
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))


def test_nothing_is_kept_alive():
    saved = [_OnCPU(torch.zeros(4)) for _ in range(3)]
    dead = [weakref.ref(one) for one in saved[:2]]
    saved = saved[2:]
    gc.collect()
    assert not any(one() for one in dead) and saved[0].load().numel() == 4


def test_strides_come_back_without_gaps():
    wide = torch.randn(4, 3, 10)
    views = [wide.transpose(1, 2), wide[:, :, 2:5], wide[1:2], wide[:0]]
    views += [wide.transpose(1, 2)[:, 2:5], wide.permute(2, 0, 1)[::2]]  # permuted, with gaps
    for tensor in views:
        back = _OnCPU(tensor).load()
        assert torch.equal(back, tensor) and back.stride() == torch.empty_like(tensor).stride()


class TestGpu:
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]

    @pytest.mark.parametrize("ahead", [0, 2**20, 2**30])
    def test_gradients_are_the_same(self, monkeypatch, ahead):
        """Copies race with what is computed and with memory handed out anew; should one lose, numbers differ."""
        monkeypatch.setattr(_OnCPU, "ahead_bytes", ahead)
        monkeypatch.setattr(_OnCPU, "piece_bytes", 2**18)
        plain = gradients("cuda", False, size=2**18, steps=40)
        for _ in range(3):
            for ours, expected in zip(gradients("cuda", True, size=2**18, steps=40), plain):
                assert torch.equal(ours, expected)

    @pytest.mark.parametrize(("offload", "least", "most"), [(False, 60, 80), (True, 3, 10)])
    def test_memory_is_given_back(self, monkeypatch, offload, least, most):
        """Of 64 saved tensors few are there at once."""
        monkeypatch.setattr(_OnCPU, "ahead_bytes", 2**23)
        hidden = torch.randn(2**20, device="cuda", requires_grad=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(64):
            with offload_saved(*([hidden] if offload else [])):
                hidden = hidden * hidden
        hidden.sum().backward()
        assert least * 2**22 < torch.cuda.max_memory_allocated() - before < most * 2**22
