"""What the tests of the library share: windows of few draws, since planning the usual ones would take most of a run."""

import pytest

from vamba.data import stream

from training_data import WINDOW


@pytest.fixture(scope="module", autouse=True)
def _small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW", WINDOW)
        yield
