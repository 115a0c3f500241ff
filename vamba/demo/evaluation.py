"""Questions about videos the model has never seen, asked through `VideoChat`, and what they would score without them.

The chance level is that of the best constant answer to each question, so an uneven sample does not flatter the model.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from vamba.chat import VideoChat
from vamba.modeling import VideoMemory
from vamba.where import Where

from .videos import FPS, QUESTIONS, Story


MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Reply:
    """One question about one video: what was answered, what happens in it, and whether the model looked at it.

    `looked_at_event` is None for a model without attention to the video.
    """

    video: Path
    kind: str
    answer: str
    truth: str
    looked_at_event: bool | None = None

    @property
    def correct(self) -> bool:
        return self.answer == self.truth


def ask_about_videos(model, processor, paths: Sequence[Path], told: Sequence[Story]) -> list[Reply]:
    """Watches each video once and asks it every question."""
    chat, replies = VideoChat(model, processor), []
    for path, story in zip(tqdm(paths, desc="watching and asking", unit="video"), told):
        chat.watch(str(path), progress=False)
        for kind, question in QUESTIONS.items():
            answer = chat.ask([{"role": "user", "content": question}], max_new_tokens=MAX_NEW_TOKENS)
            looked = looked_at_event(chat.where(), story, kind) if isinstance(chat.memory, VideoMemory) else None
            replies.append(Reply(path, kind, answer, story.answer(kind), looked))
    return replies


def ask_without_video(model, processor, paths: Sequence[Path], told: Sequence[Story]) -> list[Reply]:
    """The same questions with nothing to watch; a greedy answer depends on the question only, so each is asked once."""
    replies = []
    for kind, question in QUESTIONS.items():
        turn = {"role": "user", "content": [{"type": "text", "text": question}]}
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
        inputs = processor.tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
        answer = processor.tokenizer.decode(output, skip_special_tokens=True).strip()
        replies.extend(Reply(path, kind, answer, story.answer(kind)) for path, story in zip(paths, told))
    return replies


def looked_at_event(where: Where, story: Story, kind: str, patches: int = 0) -> bool:
    """Whether the curve of an answer peaks while what was asked about happens: the first flash, or the shape's visit.

    So many `patches` before and after the peak count as well.
    """
    curve = where.curves[0]
    peak = int(curve.heights.argmax())
    first, last = (min(max(peak + by, 0), len(curve.seconds) - 1) for by in (-patches, patches))
    start, stop = (frame / FPS for frame in (story.flashes[0] if kind == "first" else story.visit))
    return float(curve.seconds[first, 0]) < stop and float(curve.seconds[last, 1]) > start


def accuracy(replies: Sequence[Reply]) -> float:
    """Share of answers that match exactly."""
    return sum(reply.correct for reply in replies) / len(replies)


def chance(replies: Sequence[Reply]) -> float:
    """Accuracy of giving each kind of question its most frequent answer among `replies`, always."""
    truths = {kind: Counter(reply.truth for reply in replies if reply.kind == kind) for kind in QUESTIONS}
    return sum(max(counts.values()) for counts in truths.values() if counts) / len(replies)


def by_question(replies: Sequence[Reply]) -> dict[str, float]:
    """Accuracy of the answers to each question."""
    return {
        question: accuracy([reply for reply in replies if reply.kind == kind]) for kind, question in QUESTIONS.items()
    }


def share_looked_at(replies: Sequence[Reply]) -> float | None:
    """Share of the answers for which the model looked most at what was asked about; None where nobody can tell."""
    looked = [reply.looked_at_event for reply in replies if reply.looked_at_event is not None]
    return sum(looked) / len(looked) if looked else None


def scores(replies: Sequence[Reply], blind: Sequence[Reply], on_longer: Sequence[Reply]) -> dict:
    """The numbers of an evaluation: with and without video, and with longer videos than those of the training."""
    return {
        "accuracy": accuracy(replies),
        "text_only_accuracy": accuracy(blind),
        "chance": chance(replies),
        "accuracy_by_question": by_question(replies),
        "looked_at_event": share_looked_at(replies),
        "longer_accuracy": accuracy(on_longer),
        "longer_accuracy_by_question": by_question(on_longer),
    }
