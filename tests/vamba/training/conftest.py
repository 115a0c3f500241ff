"""Batches of the data set, for tests of what is computed of them."""

import pytest
from transformers import AutoProcessor

from vamba.data import Collator, ConversationEncoder, Source


@pytest.fixture(scope="module")
def collator(checkpoint, dataset):
    encoder = ConversationEncoder(AutoProcessor.from_pretrained(checkpoint), fps=8, media_root=str(dataset.parent))
    return Collator(encoder)


@pytest.fixture(scope="module")
def examples(dataset):
    source = Source(dataset, shuffle=False)
    return [source[n][1] for n in range(3)]
