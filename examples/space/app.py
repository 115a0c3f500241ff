"""The web page of `vamba serve --ui` as a Hugging Face Space. The variables of the Space say which model and videos."""

import os

from vamba.chat import load_chat
from vamba.serving.page import build_page, page_options


# VAMBA_MODEL: a checkpoint's Hub id or folder; VAMBA_VIDEOS: a folder of videos to pick from, if any
page = build_page(load_chat(os.environ["VAMBA_MODEL"]), media_root=os.environ.get("VAMBA_VIDEOS"))
page.launch(**page_options(page))
