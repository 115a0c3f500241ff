"""The memory for media, and the bounds of numbers."""

import math

import numpy as np
import pytest

from vamba.modeling.media_limits import check_memory, check_numbers, media_memory, number


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", 2 << 30), ("1000000", 10**6), ("512MB", 512 * 10**6), ("512 MiB", 512 << 20), ("2GiB", 2 << 30),
        ("1.5g", 15 * 10**8), ("64k", 64_000), ("1TiB", 1 << 40),
    ],
)  # fmt: skip
def test_the_memory_is_that_of_the_environment(text, size, monkeypatch):
    monkeypatch.setenv("VAMBA_MEDIA_MEMORY", text)
    assert media_memory() == size


@pytest.mark.parametrize("text", ["lots", "-1", "0", "2iB", "1e9", "nan", "1 PB", "٣MB", "9" * 400])
def test_what_is_no_memory_is_named(text, monkeypatch):
    monkeypatch.setenv("VAMBA_MEDIA_MEMORY", text)
    with pytest.raises(ValueError, match="VAMBA_MEDIA_MEMORY='.*512MB"):
        media_memory()


def test_too_much_is_told_with_both_sizes_and_the_remedy(monkeypatch):
    monkeypatch.setenv("VAMBA_MEDIA_MEMORY", "1GiB")
    check_memory("this", 2**30, "no")
    with pytest.raises(ValueError, match="this would take 3,072.0 MiB .* 1,024.0 MiB .* halve it, or raise VAMBA_"):
        check_memory("this", 3 << 30, "halve it")


@pytest.mark.parametrize("value", [True, np.True_, "5", b"5", [5], {}, object(), math.nan, -1, 10**400])
@pytest.mark.parametrize("name", ["fps", "num_frames", "min_pixels", "end"])
def test_what_is_no_number_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an? (number|integer) "):
        check_numbers({name: value})


def test_numbers_of_any_type_within_bounds_are_taken():
    for value in (8, 8.0, np.int64(8), np.float32(8), np.uint8(8)):
        assert number("num_frames", value) == 8 and isinstance(number("num_frames", value), int)
    assert number("end", math.inf) == math.inf and number("fps", None) is None
    for name, value in (("num_frames", 2.5), ("resized_height", 16385), ("min_pixels", 1e300), ("fps", 1e308)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            number(name, value)
