"""Attention batched over frames against transformers' loop over them."""

import pytest
import torch
from torch.nn import functional as F

from vamba.modeling.vision_tower import frame_runs

from tiny_vamba import media, tiny_model


@pytest.mark.parametrize("grids", [[(5, 4, 6)], [(1, 4, 6), (3, 6, 4), (2, 8, 4)], [(2, 4, 4), (1, 2, 2), (2, 4, 4)]])
def test_equals_the_loop_over_frames_with_every_gradient(grids):
    tower = tiny_model().model.visual
    pixels, grid = media(*grids)
    results = []
    for runs in (None, frame_runs(grid.tolist())):
        tower.zero_grad()
        output = tower(pixels, grid_thw=grid, frame_runs=runs).pooler_output
        output.pow(2).sum().backward()
        results.append([output, *(p.grad.clone() for p in tower.parameters())])
    for batched, looped in zip(*reversed(results)):
        torch.testing.assert_close(batched, looped, rtol=1e-4, atol=1e-5)


def test_frames_of_one_size_are_one_call(monkeypatch):
    model = tiny_model()
    calls, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: calls.append(q.shape) or attend(q, *a, **k)
    )
    pixels, grid = media((6, 4, 6), (3, 6, 4), (2, 4, 4))
    model.get_video_features(pixels, grid)
    assert calls == [(9, 2, 24, 16), (2, 2, 16, 16)] * 2  # two blocks; 4 x 6 and 6 x 4 patches are equally many


def test_runs_join_neighbours_of_equal_size():
    assert frame_runs([[2, 4, 6], [3, 6, 4], [1, 2, 2], [1, 4, 6]]) == [(5, 24), (1, 4), (1, 24)]
    assert frame_runs([]) == []
