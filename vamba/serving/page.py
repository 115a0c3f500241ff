"""The web page: watch a video, chat about it, see where the model looked, keep the memory and open it again.

What is unusual: one model serves all visitors, each with a `VideoChat` of their own (`sessions`); whatever needs the
model goes through `Turns`. The page fetches nothing from elsewhere, and text is shown as text, as Markdown of an answer
could name pictures anywhere. A mistake is one sentence on the page; a fault is logged, and the page says so.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from html import escape
from logging import getLogger
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import psutil
import torch

from vamba.chat import MEMORIES, VideoChat, open_memory
from vamba.errors import UserError
from vamba.modeling import VideoMemory
from vamba.where import Where

from .sessions import Limits, Session, Sessions, Stopped, Turns, Waiting
from .timeline import SEEK, short, timeline_html


if TYPE_CHECKING:
    from .inference import Inference

try:
    import gradio as gr
except ImportError as error:
    raise UserError("The web page needs gradio: pip install 'vamba[ui]'.") from error


VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv"}
CHUNK_ON_CPU = 32  # frames encoded between two lines of progress
MOST_PICKS = 500  # videos of a folder that can be picked
EMPTY = "Upload a video and press <b>Watch</b>. It is read once; then ask as often as you like."
PLACEHOLDER = "### Ask about the video\nWatch a video first, or open a memory that you saved."
WAIT = "…"
STYLE = (Path(__file__).parent / "page.css").read_text()
_log = getLogger(__name__)


def build_page(
    chat: VideoChat,
    *,
    inference: "Inference | None" = None,
    media_root: str | os.PathLike | None = None,
    reading: dict[str, Any] | None = None,
    limits: Limits = Limits(),  # noqa: B008 it is frozen
) -> gr.Blocks:
    """The page; `page_options` says with what to launch or mount it.

    Args:
        chat: of the model that answers; its own memory is not touched.
        inference: the one thread that works with the model, where others work with it as well; None makes one.
        media_root: a folder whose videos can be picked by anyone who sees the page; those that lie there now.
        reading: options of `VideoChat.watch` for every video, unless the visitor chooses otherwise.
        limits: what visitors may take.

    Raises:
        UserError: `media_root` is no folder.
    """
    return _Page(chat, inference, media_root, reading or {}, limits).build()


def page_options(page: gr.Blocks) -> dict[str, Any]:
    """Keyword arguments of `page.launch` and of `gradio.mount_gradio_app`, without which the page looks bare.

    Its look, the files that it shows, the bound on uploads, and no link or script to anywhere else.
    """
    font = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=font, font_mono=["ui-monospace", "monospace"]
    )
    return page.vamba_options | {
        "theme": theme,
        "css": STYLE,
        "footer_links": [],
        "run_history": False,
        "show_error": False,
        "ssr_mode": False,
    }


class _Page:
    def __init__(self, chat, inference, media_root, reading: dict, limits: Limits):
        self.model, self.processor, self.reading, self.limits = chat.model, chat.processor, reading, limits
        self.sessions = Sessions(lambda: VideoChat(chat.model, chat.processor, **chat.memory_options), limits)
        submit = inference.submit if inference else ThreadPoolExecutor(1, thread_name_prefix="vamba-page").submit
        self.turns = Turns(submit)
        # between its chunks a video that is watched lets those go first who wait for an answer
        self.watching = Turns(inference.submit_encoding) if inference else self.turns
        self.answer_waiting = inference.answer_waiting if inference else lambda: None
        self.picks = [] if media_root is None else videos_below(media_root)
        self.can_look = MEMORIES[chat.model.config.model_type] is VideoMemory

    # ---- what it looks like

    def build(self) -> gr.Blocks:
        name = escape(Path(self.model.name_or_path or "a model").name)
        with gr.Blocks(title="Vamba", analytics_enabled=False, fill_width=True, delete_cache=(600, 6 * 3600)) as page:
            gr.HTML(
                f"<h1>Vamba</h1><p>Watch once, ask as often as you like <span>{name}</span></p>",
                elem_id="head",
                padding=False,
            )
            with gr.Row(equal_height=False):
                with gr.Column(min_width=320):
                    self._lay_out_video()
                with gr.Column(min_width=320):
                    self._lay_out_chat()
            self.timeline = gr.HTML(visible=False, js_on_load=SEEK, elem_id="timeline")
            self._wire(page)
        for taking in (self.player, self.opener):
            taking.async_move_resource_to_block_cache = _only_uploads(taking.async_move_resource_to_block_cache)
        page.queue(default_concurrency_limit=None, max_size=4 * self.limits.sessions)
        page.vamba_options = {"allowed_paths": [path for _, path in self.picks], "max_file_size": self.limits.upload}
        return page

    def _lay_out_video(self) -> None:
        self.player = gr.Video(
            label="Video", sources=["upload"], height=270, elem_id="player", interactive=True, show_label=False
        )
        self.pick = gr.Dropdown(
            self.picks, value=None, label="Or pick one of these", visible=bool(self.picks), elem_id="pick"
        )
        with gr.Row(elem_classes="buttons"):
            self.watch_button = gr.Button("Watch", variant="primary", size="md", min_width=90, elem_id="watch")
            self.append_button = gr.Button(
                "Watch as well", size="md", min_width=120, interactive=False, elem_id="append"
            )
            self.stop_button = gr.Button("Stop", size="md", variant="stop", min_width=80, visible=False, elem_id="stop")
        self.status = gr.HTML(_status(EMPTY), elem_id="status", padding=False)
        with gr.Row(elem_classes="buttons"):
            self.save_button = gr.Button("Save memory", size="sm", min_width=120, interactive=False, elem_id="save")
            self.opener = gr.UploadButton(
                "Open a memory", size="sm", min_width=120, file_types=[".safetensors"], elem_id="open"
            )
            self.download = gr.DownloadButton(visible="hidden", elem_id="download")
        with gr.Accordion("What is taken of a video", open=False):
            with gr.Row():
                self.fps = gr.Number(label="Frames per second", info="empty: the model's own", minimum=0, value=None)
                self.frames = gr.Number(
                    label="Number of frames", info="spread over it, instead", minimum=0, precision=0, value=None
                )

    def _lay_out_chat(self) -> None:
        self.chatbot = gr.Chatbot(
            show_label=False, height=400, placeholder=PLACEHOLDER, render_markdown=False, buttons=[],
            elem_id="chat", feedback_options=None, layout="bubble", group_consecutive_messages=False,
        )  # fmt: skip
        self.question = gr.Textbox(
            show_label=False, placeholder="Ask a question", submit_btn=True, elem_id="question", max_lines=4
        )
        with gr.Row(elem_classes="buttons"):
            self.new_button = gr.Button("New conversation", size="sm", min_width=120, elem_id="new")
            self.halt_button = gr.Button("Stop", size="sm", variant="stop", min_width=80, visible=False, elem_id="halt")
        with gr.Accordion("Answers", open=False):
            self.system = gr.Textbox(label="System prompt", info="for a new conversation", max_lines=4)
            with gr.Row():
                self.new_tokens = gr.Slider(
                    1, self.limits.new_tokens, min(256, self.limits.new_tokens), step=1, label="Tokens at most"
                )
                self.temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: the likeliest answer")
            self.look = gr.Checkbox(self.can_look, label="Show where it looked", visible=self.can_look)

    def _wire(self, page: gr.Blocks) -> None:
        """Says what happens when; what has no `api_name` is not for clients."""
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        told = {"show_progress": "hidden"}
        after_watching = [
            self.status, self.chatbot, self.timeline, self.watch_button, self.append_button, self.save_button,
            self.stop_button,
        ]  # fmt: skip
        read = [self.player, self.fps, self.frames]
        self.watch_button.click(self.watch, read, after_watching, api_name="watch", **told)
        self.append_button.click(self.watch_as_well, read, after_watching, api_name="watch_as_well", **told)
        self.opener.upload(self.open_memory, self.opener, [*after_watching, self.player], api_name="open", **told)
        self.pick.input(lambda path: path, self.pick, self.player, **quiet)
        for button in (self.stop_button, self.halt_button):
            button.click(self.stop, queue=False, api_name="stop", **told)
        self.save_button.click(self.save, None, [self.download, self.status], api_name="save", **told).success(
            None, js="() => document.querySelector('#download').click()", **quiet
        )
        asking = self.question.submit(
            self.ask,
            [self.question, self.system, self.new_tokens, self.temperature, self.look],
            [self.chatbot, self.question, self.timeline, self.halt_button],
            api_name="ask",
            **told,
        )
        for forget in (self.new_button.click, self.chatbot.clear):
            shown = [self.chatbot, self.timeline, self.halt_button]
            forget(self.new_conversation, None, shown, api_name="new", cancels=[asking], **told)
        self.timeline.click(self.seek, None, self.player, queue=False, **quiet)
        page.unload(self.leave)

    # ---- what it does

    def watch(self, path: str | None, fps: float | None, frames: int | None, request: gr.Request):
        """Watches a video and begins a new conversation."""
        yield from self._watch(path, fps, frames, request, append=False)

    def watch_as_well(self, path: str | None, fps: float | None, frames: int | None, request: gr.Request):
        """Watches one more video; the conversation goes on."""
        yield from self._watch(path, fps, frames, request, append=True)

    def _watch(self, path: str | None, fps: float | None, frames: int | None, request: gr.Request, append: bool):
        yield {self.stop_button: gr.update(visible=True), self.status: _status("Opening the video …", 0)}
        try:
            if path is None:
                raise UserError("There is no video; upload one first.")
            session = self.sessions.of(request.session_hash)
            chosen = {name: value for name, value in (("fps", fps), ("num_frames", frames)) if value}

            def work(emit: Callable[[Any], None]) -> None:
                began = monotonic()
                goes_on = append and session.chat.memory is not None
                reading = self._reading(chosen, session, goes_on)

                def progress(done: int, total: int | None) -> None:
                    emit((done, total, monotonic() - began))
                    self.answer_waiting()

                chunk = None if self.model.device.type == "cuda" else CHUNK_ON_CPU
                session.chat.watch(path, append=goes_on, progress=progress, chunk_frames=chunk, **reading)
                session.sources = [*(session.sources if goes_on else ()), path]
                session.shown, session.strips = session.shown if goes_on else [], {}

            rate = ""
            for event in self.watching.run(session, work):
                if isinstance(event, Waiting):
                    yield {self.status: _status(_waiting(event), 0)}
                    continue
                rate = f", {event[0] / event[2]:.0f} frames/s"
                yield {self.status: self._progress(*event[:2], rate)}
            shown = self._watched(session, f"Watched {Path(path).name}{rate}.")
        except Exception as error:
            shown = {self.status: _status(escape(self._told(error, path)), kind="error")}
        yield shown | {self.stop_button: gr.update(visible=False)}

    def _reading(self, chosen: dict, session: Session, append: bool) -> dict[str, Any]:
        """Options of `watch`: the page's, the visitor's, and no more frames than are left to the session."""
        reading = {k: v for k, v in self.reading.items() if not (chosen and k in ("fps", "num_frames"))} | chosen
        left = self.limits.frames - (self._frames(session.chat.memory) if append else 0)
        if left < 1:
            raise UserError(f"{self.limits.frames} frames are watched, which is the most; press Watch to begin anew.")
        if reading.get("num_frames", 0) > left:
            raise UserError(f"{reading['num_frames']} frames are more than the {left} that may be watched; take fewer.")
        if "num_frames" in reading:
            return reading
        return reading | {"max_frames": min(left, reading.get("max_frames", left))}

    def _progress(self, done: int, total: int | None, rate: str) -> str:
        of = f" of {total}" if total else ""
        text = f"Watching: {done}{of} frames{rate}, {_memory_in_use(self.model.device)}"
        return _status(text, min(done / total, 1) if total else 0)

    def _watched(self, session: Session, said: str) -> dict:
        """What the page shows once a video was watched or a memory opened."""
        return {
            self.status: _status(f"<b>{escape(said)}</b><br>{self._about(session.chat.memory)}", kind="done"),
            self.chatbot: list(session.shown),
            self.timeline: gr.update(visible=False),
            self.append_button: gr.update(interactive=True),
            self.save_button: gr.update(interactive=True),
        }

    def _frames(self, memory: Any) -> int:
        step = self.processor.video_processor.temporal_patch_size
        return sum(t * (step if kind == "video" else 1) for kind, t, _, _ in memory.media[0])

    def _about(self, memory: Any) -> str:
        duration = "" if memory.seconds is None else f" of {short(memory.seconds)}"
        tokens, frames = memory.video_length, self._frames(memory)
        return f"In memory: {frames:,} frames{duration}, {tokens:,} tokens, {_size(memory.video_nbytes)}."

    def stop(self, request: gr.Request) -> None:
        self.sessions.of(request.session_hash).stop()

    def leave(self, request: gr.Request) -> None:
        self.sessions.leave(request.session_hash)

    def ask(self, question: str, system: str, new_tokens: int, temperature: float, look: bool, request: gr.Request):
        """Answers a question; the conversation goes on."""
        shown: list[dict] = [{"role": "user", "content": question}, {"role": "assistant", "content": WAIT}]
        try:
            session = self.sessions.of(request.session_hash)
            if session.chat.memory is None:
                raise UserError("Nothing was watched yet; watch a video first, or open a memory.")
            shown = [*session.shown, *shown]
            yield {self.chatbot: shown, self.question: "", self.halt_button: gr.update(visible=True)}
            if not session.chat.history:
                session.chat.system = (system or "").strip() or None
            generation = {"max_new_tokens": new_tokens}
            generation |= {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}

            def work(emit: Callable[[Any], None]) -> None:
                with closing(session.chat.ask(question, stream=True, **generation)) as pieces:
                    for piece in pieces:
                        emit(piece)
                if look and self.can_look:
                    emit(session.chat.where())

            answer = ""
            for event in self.turns.run(session, work):
                if isinstance(event, Where):
                    yield {self.timeline: gr.update(visible=True, value=timeline_html(event, session.strips))}
                    continue
                answer += event if isinstance(event, str) else ""
                shown[-1]["content"] = answer.strip() or (_waiting(event) if isinstance(event, Waiting) else WAIT)
                session.shown = shown if answer else session.shown
                yield {self.chatbot: shown}
        except Exception as error:
            title = "Not finished"
            if shown[-1]["content"] == WAIT:
                shown, title = shown[:-1], "No answer"
            shown = [*shown, {"role": "assistant", "content": self._told(error), "metadata": {"title": title}}]
        yield {self.chatbot: shown, self.halt_button: gr.update(visible=False)}

    def new_conversation(self, request: gr.Request) -> dict:
        """Forgets the conversation, and an answer that is under way; keeps what was watched."""
        session = self.sessions.of(request.session_hash)
        session.stop()

        def work(emit: Callable[[Any], None]) -> None:  # in turn, as an answer is remembered when it ends
            session.chat.reset()
            session.shown = []

        list(self.turns.run(session, work))
        hidden = gr.update(visible=False)
        return {self.chatbot: [], self.timeline: hidden, self.halt_button: hidden}

    def seek(self, event: gr.EventData, request: gr.Request) -> Any:
        """Shows the video of which a moment was clicked; the click itself seeks."""
        sources = self.sessions.of(request.session_hash).sources
        medium = event.medium
        if type(medium) is not int or not 0 <= medium < len(sources) or sources[medium] is None:
            return gr.skip()
        return sources[medium]

    def save(self, request: gr.Request) -> tuple:
        """Writes what was watched to a file, to be downloaded."""
        try:
            session = self.sessions.of(request.session_hash)
            if session.chat.memory is None:
                raise UserError("Nothing was watched yet; there is no memory to save.")
            path = Path(session.folder.name) / f"{Path(next(filter(None, session.sources), 'video')).stem}.safetensors"
            for _ in self.turns.run(session, lambda emit: session.chat.memory.save(path)):
                pass
            said = f"<b>Saved the memory as {escape(path.name)}.</b><br>{self._about(session.chat.memory)}"
            return gr.update(value=str(path)), _status(said, kind="done")
        except Exception as error:
            raise gr.Error(escape(self._told(error)), print_exception=False) from error

    def open_memory(self, path: str, request: gr.Request):
        """Opens a memory that was saved, and begins a new conversation."""
        yield {self.status: _status("Opening the memory …", 0)}
        try:
            session = self.sessions.of(request.session_hash)

            def work(emit: Callable[[Any], None]) -> None:
                session.chat = VideoChat(self.model, self.processor, self._opened(path), **session.chat.memory_options)
                session.sources, session.strips = [None] * len(session.chat.memory.media[0]), {}
                session.shown = []

            for event in self.turns.run(session, work):
                yield {self.status: _status(_waiting(event), 0)}
            yield self._watched(session, f"Opened {Path(path).name}.") | {self.player: None}
        except Exception as error:
            yield {self.status: _status(escape(self._told(error, path)), kind="error")}

    def _opened(self, path: str) -> Any:
        """A memory from a file, checked against the model."""
        memory = open_memory(self.model, path)
        if self._frames(memory) > self.limits.frames:
            raise UserError(f"{path} holds {self._frames(memory)} frames; {self.limits.frames} are the most here.")
        return memory

    def _told(self, error: BaseException, path: str | None = None) -> str:
        """One sentence about an error, without the folders of this machine."""
        if isinstance(error, Stopped):
            return "Stopped."
        if isinstance(error, torch.OutOfMemoryError):
            return "The memory of the GPU is full; take fewer frames, or try again later."
        if isinstance(error, ValueError):  # a UserError, or what the models say to input that they cannot take
            said = str(error)
            return said.replace(path, Path(path).name) if path else said
        _log.error("A request of the page failed.", exc_info=error)
        return "Something went wrong here, which is not your fault; the log of the server says more."


def videos_below(root: str | os.PathLike) -> list[tuple[str, str]]:
    """Names and paths of the videos below a folder, in order. Raises UserError where it is no folder."""
    root = Path(root).resolve()
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give the folder of the videos.")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in VIDEOS)
    inside = (path for path in paths if path.is_file() and path.resolve().is_relative_to(root))
    found = [(str(path.relative_to(root)), str(path)) for path in inside]
    if len(found) > MOST_PICKS:
        _log.warning("%s holds %d videos; the page lists the first %d.", root, len(found), MOST_PICKS)
    return found[:MOST_PICKS]


def _only_uploads(move: Callable) -> Callable:
    """Gradio would fetch any URL that a request names as a file; a request cannot switch the network on."""

    async def move_upload(named: Any) -> Any:
        if "://" in str(named):
            raise gr.Error("A file is uploaded here, not named by a URL.", print_exception=False)
        return await move(named)

    return move_upload


def _status(text: str, done: float | None = None, kind: str = "") -> str:
    """A line of the page in HTML, above a bar that is `done` (0 to 1) where that is known."""
    bar = "" if done is None else f'<div class="bar"><i style="width:{done:.1%}"></i></div>'
    return f'<div class="status {kind}" role="status"><p>{text}</p>{bar}</div>'


def _waiting(event: Waiting) -> str:
    return f"Waiting for {event.others} other{'s' if event.others > 1 else ''} …"


def _memory_in_use(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{_size(torch.cuda.memory_allocated(device))} of GPU memory in use"
    return f"{_size(psutil.Process().memory_info().rss)} of memory in use"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
