"""What the tests of the library share: a recipe, and windows of few draws, as planning the usual ones takes long."""

import pytest

from vamba.data import stream

from training_data import WINDOW, recipe_values


@pytest.fixture(scope="module", autouse=True)
def _small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW", WINDOW)
        yield


@pytest.fixture
def values(checkpoint, dataset, tmp_path):
    """A recipe for the tiny checkpoint and the module's `dataset`."""
    return recipe_values(checkpoint, dataset, tmp_path / "out")
