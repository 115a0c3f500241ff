"""Several questions about one video: asked as the evaluation does, which encodes it once, and one by one.

    python benchmarks/evaluation.py [--model 7b|2b|PATH] [--frames 256 1024] [--questions 1 3 10] [--out evaluation.md]

Both sides answer the same questions about the same file with the same model, in turn, in one process; reading and
decoding count. "One by one" is `VideoChat.watch` and `ask` for each question, which is what every other model under
lmms-eval does, only streamed. "7b" and "2b" have random weights of Qwen2-VL's sizes and read any text in bytes; their
answers have `--new-tokens` tokens. Seconds are the median of three, after one to warm up, and one where a turn is long.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from vamba.bench.clock import default_device, machine, now
from vamba.bench.models import SEVEN_BILLION, random_model
from vamba.bench.parts import make_clip
from vamba.bench.report import table
from vamba.chat import VideoChat, load_chat
from vamba.demo.tiny_checkpoints import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer
from vamba.evaluation import Protocol, Question, answer_questions
from vamba.modeling import VambaConfig, VambaForConditionalGeneration, VambaProcessor


TWO_BILLION = {
    "text_config": SEVEN_BILLION["text_config"]
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "vision_config": SEVEN_BILLION["vision_config"] | {"hidden_size": 1536},
    "mamba_config": {"hidden_size": 1536},
}
LONG = 60  # seconds of a turn that is not repeated


def random_chat(sizes: dict, device: torch.device) -> VideoChat:
    """A chat with random weights, whose tokenizer spells everything in bytes."""
    tokenizer = tiny_tokenizer(["What happens in the video?"])
    names = ("image", "video", "vision_start", "vision_end")
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[name]) for name in names}
    model = random_model(VambaForConditionalGeneration, VambaConfig(**sizes, **ids), device, torch.bfloat16)
    size = {"shortest_edge": 56 * 56, "longest_edge": 640 * 360}
    parts = Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size)
    return VideoChat(model, VambaProcessor(*parts, chat_template=CHAT_TEMPLATE))


def one_by_one(chat: VideoChat, questions: list[Question], protocol: Protocol) -> list[str]:
    replies = []
    for question in questions:
        chat.watch(question.videos[0], progress=False, **protocol.reading)
        replies.append(
            chat.ask(
                [{"role": "user", "content": question.text}], max_new_tokens=protocol.max_open_tokens, do_sample=False
            )
        )
    return replies


def grouped(chat: VideoChat, questions: list[Question], protocol: Protocol) -> list[str]:
    answers = list(answer_questions(chat, questions, protocol, progress=False))
    assert not any(answer.error for answer in answers), answers
    return [answer.reply for answer in answers]


def seconds_of(ask: Callable[[], list[str]], device: torch.device, repeats: int = 3) -> tuple[float, list[str]]:
    times: list[float] = []
    while len(times) < repeats and sum(times) < LONG:
        start = now(device)
        replies = ask()
        times.append(now(device) - start)
    return statistics.median(times), replies


def measure(chat: VideoChat, video: Path, frames: int, count: int, new_tokens: int) -> dict:
    protocol = Protocol("benchmark", "", {"num_frames": frames}, max_open_tokens=new_tokens)
    questions = [Question(f"{index}", (str(video),), f"What happens, number {index}?") for index in range(count)]
    device = chat.model.device
    alone, first = seconds_of(lambda: one_by_one(chat, questions, protocol), device)
    together, second = seconds_of(lambda: grouped(chat, questions, protocol), device)
    row = {"frames": frames, "questions": count, "one by one (s)": alone}
    return row | {"encoded once (s)": together, "times as fast": alone / together, "same answers": first == second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b")
    parser.add_argument("--frames", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--video", type=Path, help="by default a clip of 1280x720 with as many seconds as frames / 4")
    parser.add_argument("--out", type=Path, help="write a report (Markdown) here")
    args = parser.parse_args()
    device = default_device()
    sizes = {"7b": SEVEN_BILLION, "2b": TWO_BILLION}.get(args.model)
    chat = load_chat(args.model) if sizes is None else random_chat(sizes, device)
    with tempfile.TemporaryDirectory() as folder:
        video = args.video or make_clip(Path(folder) / "clip.mp4", -(-max(args.frames) // 4), fps=4)
        measure(chat, video, min(args.frames), 1, 2)  # kernels are compiled, handles made
        rows = [
            measure(chat, video, frames, count, args.new_tokens) for frames in args.frames for count in args.questions
        ]
    facts = "\n".join(f"- {name}: {value}" for name, value in machine(chat.model.device).items())
    text = f"# Questions about one video\n\n{facts}\n- model: {Path(args.model).name}\n\n{table(rows)}\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
