"""Training data: examples from files, conversations to model inputs, batches that know their place in the data."""

from .collator import Collator, fill_packs, pack, pad
from .conversations import ExampleError, to_messages
from .encoding import ConversationEncoder, Plan
from .labels import spoken_parts, template_options
from .sources import Mixture, Source
from .stream import ABOUT, About, Position, TrainingStream, check_layout


__all__ = [
    "ABOUT",
    "About",
    "Collator",
    "ConversationEncoder",
    "ExampleError",
    "Mixture",
    "Plan",
    "Position",
    "Source",
    "TrainingStream",
    "check_layout",
    "fill_packs",
    "pack",
    "pad",
    "spoken_parts",
    "template_options",
    "to_messages",
]
