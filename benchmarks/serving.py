"""`vamba serve` through OpenAI's client: one video asked often, many clients, a restart, budgets that are too small.

    python benchmarks/serving.py [--model runs/demo|7b|PATH] [--frames 600] [--questions 20] [--clients 16]

The server runs in this process, with the model that the other side, `VideoChat.ask`, asks as well: each question is
asked both ways, in turn, greedily, with `--new-tokens` tokens at most. A restart is a new server with this model and
an empty cache above the same folder. "7b" has random weights of Qwen2-VL's sizes and reads any text in bytes.
"""

import argparse
import re
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from evaluation import TWO_BILLION, random_chat
from openai import OpenAI

from vamba.bench.clock import default_device, machine
from vamba.bench.models import SEVEN_BILLION
from vamba.bench.parts import make_clip
from vamba.bench.report import table
from vamba.chat import MEMORIES, VideoChat, load_chat
from vamba.console import quiet_transformers
from vamba.serving.app import Server
from vamba.serving.media import Media
from vamba.serving.memory_cache import MemoryCache


class Client:
    """OpenAI's client of one server, and the server's metrics."""

    def __init__(self, url: str, new_tokens: int):
        self.url, self.new_tokens = url, new_tokens
        self.openai = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)

    def ask(self, video: str, question: str) -> str:
        content = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": question}]
        messages: Any = [{"role": "user", "content": content}]
        reply = self.openai.chat.completions.create(
            model="bench", messages=messages, max_tokens=self.new_tokens, temperature=0
        )
        return (reply.choices[0].message.content or "").strip()

    def metric(self, name: str) -> int:
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        return round(sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))))


@contextmanager
def served(chat: VideoChat, root: Path, frames: int, new_tokens: int, **cache: Any) -> Iterator[Client]:
    kept = MemoryCache(MEMORIES[chat.model.config.model_type], chat.model.device, **cache)
    server = Server(chat, "bench", kept, Media(root), {"num_frames": frames})
    listening = uvicorn.Server(uvicorn.Config(server.app(), port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=listening.run, daemon=True)
    thread.start()
    while not listening.started:
        time.sleep(0.01)
    try:
        yield Client(f"http://127.0.0.1:{listening.servers[0].sockets[0].getsockname()[1]}", new_tokens)
    finally:
        listening.should_exit = True
        thread.join()


def ask_both_ways(chat: VideoChat, client: Client, questions: list[str], repeats: int) -> dict[str, Any]:
    """Of each question the median seconds both ways; the chat has watched what the server was asked about."""
    columns, same = [], 0
    for question in questions:
        pairs = []
        for _ in range(repeats):
            chat.reset()
            begun = time.perf_counter()
            direct = chat.ask(question, max_new_tokens=client.new_tokens, do_sample=False)
            halfway = time.perf_counter()
            answer = client.ask("0.mp4", question)
            pairs.append((halfway - begun, time.perf_counter() - halfway))
        same += direct == answer
        columns.append([statistics.median(times) for times in zip(*pairs)])
    ratios = [server / direct for direct, server in columns]
    direct, server = (statistics.median(times) * 1e3 for times in zip(*columns))
    return {
        "VideoChat.ask (ms)": direct, "server (ms)": server, "median of ratios": statistics.median(ratios),
        "largest": max(ratios), "same answers": f"{same} of {len(questions)}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo")
    parser.add_argument("--frames", type=int, default=600, help="of the long video; the others have a quarter")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write a report (Markdown) here")
    args = parser.parse_args()
    quiet_transformers()
    sizes = {"7b": SEVEN_BILLION, "2b": TWO_BILLION}.get(args.model)
    chat = load_chat(args.model) if sizes is None else random_chat(sizes, default_device())
    questions = [f"What happens, number {index}?" for index in range(args.questions + 1)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_clip(root / "0.mp4", -(-args.frames // 4), fps=4)
        for index in range(1, 5):
            make_clip(root / f"{index}.mp4", 13 * index, fps=4)
        common = chat, root, args.frames, args.new_tokens
        with served(*common, folder=root / "cache") as client:
            chat.watch(root / "0.mp4", num_frames=args.frames, progress=False)  # kernels are compiled, handles made
            chat.ask(questions[0], max_new_tokens=args.new_tokens, do_sample=False)
            begun = time.perf_counter()
            chat.watch(root / "0.mp4", num_frames=args.frames, progress=False)
            watched = time.perf_counter() - begun
            begun = time.perf_counter()
            client.ask("0.mp4", questions[0])
            first = {"VideoChat.watch (s)": watched, "first question (s)": time.perf_counter() - begun}
            first["frames decoded"] = client.metric("vamba_frames_decoded_total")
            asked = ask_both_ways(chat, client, questions[1:], args.repeats)
            asked["frames decoded"] = client.metric("vamba_frames_decoded_total") - first["frames decoded"]
            chat.memory = None
            pairs = [(f"{1 + index % 4}.mp4", questions[index // 4]) for index in range(args.clients)]
            before = client.metric("vamba_encodings_total")
            with ThreadPoolExecutor(args.clients) as clients:
                together = [*clients.map(lambda pair: client.ask(*pair), pairs)]
            encodings = client.metric("vamba_encodings_total") - before
        rows = []

        def again(what: str, **cache: Any) -> None:
            with served(*common, **cache) as other:
                answers = [other.ask(*pair) for pair in pairs]
                row = {"server": what, "encodings": other.metric("vamba_encodings_total")}
                moved = {name: other.metric(f"vamba_cache_{name}_total") for name in ("moved", "dropped")}
                rows.append(row | moved | {"same answers": answers == together})

        again("alone, one client after the other")
        again("restarted above the same folder", folder=root / "cache")
        again("budgets of 1 MiB on the GPU", gpu_bytes=2**20)
        again("budgets of 1 MiB everywhere", gpu_bytes=2**20, cpu_bytes=2**20, disk_bytes=2**20, folder=root / "small")
    facts = "\n".join(f"- {name}: {value}" for name, value in machine(chat.model.device).items())
    text = f"# Serving\n\n{facts}\n- model: {Path(args.model).name}\n\n## The first question\n\n{table([first])}\n\n"
    text += f"## {args.questions} more, each {args.repeats} times both ways\n\n{table([asked])}\n\n"
    text += f"## {args.clients} clients at once about 4 videos: {encodings} encodings\n\n{table(rows)}\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
