"""The videos that the tests of reading share. `clip` is bytes here, not the path that it is elsewhere."""

import numpy as np
import pytest

from encoded_videos import encode


@pytest.fixture(scope="module")
def clip():
    return encode(20)  # 2 s at 10 fps


@pytest.fixture(scope="module")
def long_clip():
    """40 s at 10 fps with a key frame every 2 s: long enough for jumps to pay."""
    return encode(400, gop=20, picture=lambda index: np.full((32, 32, 3), 20 + index // 2, np.uint8))
