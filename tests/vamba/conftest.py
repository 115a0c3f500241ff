"""What the tests of the library share: data, a recipe, and windows of few draws, as planning the usual takes long."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vamba.data import stream

from training_data import WINDOW, recipe_values, write_dataset


@pytest.fixture(scope="module", autouse=True)
def _small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW", WINDOW)
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"), 12)


@pytest.fixture(scope="session")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture
def picture():
    return Image.fromarray(torch.randint(256, (40, 100, 3), generator=torch.manual_seed(0)).byte().numpy())


@pytest.fixture
def values(checkpoint, dataset, tmp_path):
    """A recipe for the tiny checkpoint and the module's `dataset`."""
    return recipe_values(checkpoint, dataset, tmp_path / "out")
