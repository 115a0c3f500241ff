"""The arguments of `vamba serve`."""

import argparse
import gc
import importlib.util
import math
import os
import socket

from vamba.checkpoint_folder import base_of, check_kind
from vamba.console import (
    MODEL,
    MODEL_OPTIONS,
    READING_OPTIONS,
    add_generation_options,
    add_model_options,
    add_reading_options,
    chosen,
    generation,
    positive,
    quiet_transformers,
)
from vamba.errors import UserError


NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")
MAX_FRAMES = 16384  # of one video, four and a half hours at one a second; `--max-frames` says otherwise
LOCAL = ("localhost", "127.0.0.1", "::1")
SECONDS_TO_END = 5  # for answers under way when the server is stopped


def gigabytes(text: str) -> int:
    """An argument's type: bytes, given in GiB."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GiB, 0 or more")
    return int(value * 2**30)


def port_number(text: str) -> int:
    """An argument's type: a port to listen at."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number up to 65535, 0 for any that is free")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    parser.add_argument("--model", dest="named_model", metavar="PATH", help="the same, as other commands call it")
    parser.add_argument("--ui", action="store_true", help="show a web page at the address of the server")
    parser.add_argument("--host", default="127.0.0.1", help="to listen at; default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=port_number, default=8000, help="default: 8000")
    parser.add_argument(
        "--allowed-hosts", nargs="+", metavar="NAME",
        help="under which it may be asked; default: localhost, or any where --host is another machine's to reach",
    )  # fmt: skip
    parser.add_argument("--served-name", metavar="NAME", help="of the model in requests; default: MODEL")
    media = parser.add_argument_group("what requests may name")
    media.add_argument("--media-root", metavar="FOLDER", help="below which they may name files; default: none")
    media.add_argument("--allow-urls", action="store_true", help="let them name http(s) URLs of public addresses")
    cache = parser.add_argument_group("what is kept of videos, in GiB")
    cache.add_argument(
        "--cache-gpu", type=gigabytes, metavar="GIB", help="on the GPU; default: half of what the model leaves free"
    )
    cache.add_argument("--cache-cpu", type=gigabytes, default="16", metavar="GIB", help="in CPU memory; default: 16")
    cache.add_argument("--cache-disk", type=gigabytes, default="64", metavar="GIB", help="in --cache-dir; default: 64")
    cache.add_argument("--cache-dir", metavar="FOLDER", help="keep memories there too, for the next start")
    limits = parser.add_argument_group("what a request may take at most")
    limits.add_argument(
        "--max-body", type=positive, default=64, metavar="MIB", help="in MiB, of a URL too; default: 64"
    )
    limits.add_argument("--max-media", type=positive, default=16, help="videos and images; default: 16")
    limits.add_argument("--max-tokens", type=positive, default=4096, help="of an answer; default: 4096")
    limits.add_argument("--max-queue", type=positive, default=64, help="requests at once; default: 64")
    add_model_options(parser)
    add_reading_options(parser)
    add_generation_options(parser)
    parser.set_defaults(max_frames=MAX_FRAMES)


def run(args: argparse.Namespace) -> None:
    """Serves until it is interrupted."""
    if (args.model is None) == (args.named_model is None):
        raise UserError("MODEL is needed, once; see vamba serve --help.")
    args.model = args.model or args.named_model
    check_kind(base_of(args.model))  # at once, before torch is imported
    needed = dict.fromkeys(NEEDED, "serve") | ({"gradio": "ui"} if args.ui else {})
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        extras = ",".join(sorted({needed[name] for name in missing}))
        raise UserError(f"vamba serve needs {', '.join(missing)}: pip install 'vamba[{extras}]'.")
    listening = _bound(args.host, args.port)  # before a large model is loaded
    quiet_transformers()
    import asyncio  # late, as other commands do not need it

    import uvicorn

    from vamba.chat import MEMORIES, load_chat
    from vamba.modeling.media import free_bytes

    from .app import Limits, Server
    from .media import Media
    from .memory_cache import MemoryCache

    max_body = args.max_body * 2**20
    media = Media(args.media_root, args.allow_urls, max_body)
    chat = load_chat(args.model, **chosen(args, MODEL_OPTIONS))
    cache = MemoryCache(
        MEMORIES[chat.model.config.model_type],
        chat.model.device,
        gpu_bytes=free_bytes(chat.model.device) // 2 if args.cache_gpu is None else args.cache_gpu,
        cpu_bytes=args.cache_cpu,
        disk_bytes=args.cache_disk,
        folder=args.cache_dir,
    )
    max_tokens = max(args.max_tokens, args.max_new_tokens)
    limits = Limits(max_body, args.max_media, args.max_frames, max_tokens, args.max_queue)
    reading = chosen(args, READING_OPTIONS)
    name, hosts = args.served_name or args.model, tuple(args.allowed_hosts or (LOCAL if args.host in LOCAL else ()))
    server = Server(chat, name, cache, media, reading, generation(args), limits, args.system, hosts)
    app = server.app()
    if args.ui:
        app = _with_page(app, server, args.media_root)
    gc.collect()
    gc.freeze()  # what was loaded stays: collections while questions are answered need not look at it
    # h11, as it bounds the headers of a request, which httptools gathers without end
    config = uvicorn.Config(app, http="h11", log_level="error", timeout_graceful_shutdown=SECONDS_TO_END)
    try:
        asyncio.run(_serve(uvicorn.Server(config), listening, server.name))
    finally:
        server.close()
        gc.unfreeze()  # else triton reports as leaked what lies there when Python ends


def _with_page(app, server, media_root: str | None):
    """The app with the web page at its root, which works with the model on the server's thread."""
    import gradio
    from starlette.middleware.cors import CORSMiddleware

    from .app import refuse_other_routes
    from .page import build_page, page_options

    refuse_other_routes(app)
    # with it gradio leaves the matter to us; else it lets pages of anybody read here, if reached by another name
    app.add_middleware(CORSMiddleware, allow_origins=())
    page = build_page(server.chat, inference=server.inference, media_root=media_root, reading=server.reading)
    return gradio.mount_gradio_app(app, page, path="/", **page_options(page))


async def _serve(server, listening: socket.socket, name: str) -> None:
    """Runs a uvicorn server, and says when it listens."""
    import asyncio

    async def tell():
        while not server.started:
            await asyncio.sleep(0.01)
        host, port = listening.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"{name} is served at http://{host}:{port}/v1 (Ctrl-C ends it)", flush=True)

    telling = asyncio.ensure_future(tell())
    try:
        await server.serve(sockets=[listening])
    finally:
        telling.cancel()


def _bound(host: str, port: int) -> socket.socket:
    """A socket of this address, which does not listen yet. Raises UserError where it is taken, or none of ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}; choose another.") from error
    return bound
