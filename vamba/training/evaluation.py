"""Evaluation while training: the loss of held-out examples, the accuracy of generated answers, and early stopping.

What is unusual: all processes go through an evaluation in step. Before each batch and each answer they tell each other
whether any of them has something left and whether one got a SIGTERM; who has nothing left runs an empty batch. So
weights may be shared out (FSDP2, ZeRO-3), an evaluation ends soon after a signal, and every example counts once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce, send_to_device
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerState
from transformers.utils import logging

from vamba.chat import VideoChat
from vamba.data import ABOUT, About, Collator, ExampleError, TrainingStream
from vamba.data.encoding import IGNORED
from vamba.errors import UserError
from vamba.evaluation.asking import Answer, answer_questions, group
from vamba.evaluation.protocols import Protocol
from vamba.evaluation.questions import Question
from vamba.modeling.ranks import weights_are_sharded


SHARED_CHUNK = 32  # frames that ranks encode at once where they share the weights, and must do it equally often
logger = logging.get_logger(__name__)
T = TypeVar("T")


class NonFiniteLossError(UserError):
    """The loss is NaN or infinite; the message names the batch."""


class Stopped(Exception):
    """A SIGTERM has reached one of the processes during an evaluation, which is given up."""


@dataclass
class Evaluation:
    """What is evaluated.

    Args:
        streams: by name what the loss is computed of, each `once`.
        questions: to be answered; `protocol` says how.
        allow_urls: whether their videos may be URLs.
    """

    streams: dict[str, TrainingStream]
    questions: Sequence[Question] = ()
    protocol: Protocol = field(default_factory=lambda: Protocol("", ""))
    allow_urls: bool = False

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        processor: Any,
        load: Callable[[TrainingStream], DataLoader],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """`loss` (cross-entropy per target token), `accuracy` (share of the questions whose answers are known that are
        answered right), and how many examples and questions could not be used; the same on all processes.

        Args:
            model: in evaluation mode. load: makes a loader of a stream.
            is_stopped: whether this process got a SIGTERM.

        Raises:
            Stopped: one did. NonFiniteLossError. ExampleError: an example is broken, and `on_error` is "raise".
        """
        found: dict[str, float] = {}
        sums = {name: self._sums(model, load(stream), is_stopped) for name, stream in self.streams.items()}
        for name, (loss, targets, _) in sums.items():
            if len(sums) > 1:
                found[f"{name}_loss"] = loss / targets if targets else math.nan
        if sums:
            loss, targets, skipped = map(sum, zip(*sums.values()))
            found |= {"loss": loss / targets if targets else math.nan, "skipped_samples": int(skipped)}
        return found | (self._answer(model, processor, is_stopped) if self.questions else {})

    def _sums(self, model: nn.Module, loader: DataLoader, is_stopped: Callable[[], bool]) -> list[float]:
        """The loss summed over all targets, their number, and that of skipped examples, of all processes."""
        collator, device = loader.dataset.collator, PartialState().device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in in_step(iter(loader), is_stopped):
            about: About = About([], 0, 0, 0) if batch is None else batch.pop(ABOUT)
            if about.error is not None:
                raise ExampleError(about.error)
            for message in about.skipped:
                logger.warning_once(f"skipped {message}, at each evaluation")
                sums[2] += 1
            batch = send_to_device(batch or _empty_batch(collator), device)
            loss = model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
            if not torch.isfinite(loss):
                raise NonFiniteLossError(
                    f"The evaluation's loss is {loss.item()} for the samples {', '.join(about.samples)}; look at them, "
                    "or lower learning_rate. The checkpoints are from before."
                )
            sums[:2] += torch.stack([loss.double(), (batch["labels"][:, 1:] != IGNORED).sum()])
        return reduce(sums, "sum").tolist()

    def _answer(self, model: nn.Module, processor: Any, is_stopped: Callable[[], bool]) -> dict[str, float]:
        """Processes share the videos; where they share the weights, all answer all, as each call needs all of them."""
        state, reading, questions = PartialState(), dict(self.protocol.reading), self.questions
        shared = weights_are_sharded(model)
        if shared:
            if "encode_video" not in vars(model):  # once, or it would be wrapped again and again
                register_fsdp_forward_method(model, "encode_video")  # which has the weights outside of layers gathered
            reading["chunk_frames"] = SHARED_CHUNK
        else:
            videos = list(group(questions).values())[state.process_index :: state.num_processes]
            questions = [question for asked in videos for question, _ in asked]
        protocol = replace(self.protocol, reading=reading)
        chat = VideoChat(model, processor)
        answers = answer_questions(chat, questions, protocol, progress=False, allow_urls=self.allow_urls)
        mine = [answer for answer in in_step(answers, is_stopped) if answer is not None]
        everyone: list[Answer] = gather_object(mine if state.is_main_process or not shared else [])
        for answer in everyone:
            if answer.error is not None:
                logger.warning_once(f"question {answer.id}: {answer.error}, at each evaluation")
        right = [answer.correct for answer in everyone if answer.correct is not None]
        failed = sum(answer.error is not None for answer in everyone)
        return {"accuracy": sum(right) / len(right), "failed_questions": failed}


def in_step(items: Iterator[T], is_stopped: Callable[[], bool]) -> Iterator[T | None]:
    """The items of this process, then None for as long as another one has some.

    Raises:
        Stopped: `is_stopped` on one of them.
    """
    while True:
        item = next(items, None)
        here = torch.tensor([item is not None, is_stopped()], dtype=torch.float32, device=PartialState().device)
        left, stopped = reduce(here, "sum").tolist()
        if stopped:
            raise Stopped
        if not left:
            return
        yield item


def _empty_batch(collator: Collator) -> dict[str, Any]:
    """Two tokens of text, none of which is to be predicted."""
    token = torch.full((2,), collator.tokenizer.eos_token_id or 0)
    ignored = torch.full_like(token, IGNORED)
    return collator([{"input_ids": token, "labels": ignored, "mm_token_type_ids": torch.zeros_like(token)}])


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, whose count goes on in a run that is resumed."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = _evaluations_without_gain(state)
        control.should_training_stop = has_stopped_early(state, self.early_stopping_patience)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        super().on_evaluate(args, state, control, metrics, **kwargs)
        state.stateful_callbacks[type(self).__name__] = self.state()


def has_stopped_early(state: TrainerState, patience: int | None) -> bool:
    """Whether a run in this state ends early with this patience."""
    return patience is not None and _evaluations_without_gain(state) >= patience


def _evaluations_without_gain(state: TrainerState) -> int:
    found = state.stateful_callbacks.get(EarlyStopping.__name__, {}).get("attributes", {})
    return found.get("early_stopping_patience_counter", 0)
