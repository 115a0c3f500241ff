"""What the tests of the server send to it and read of it."""


def content(*parts):
    """A text for each text, and a video or image for each name of a file."""
    blocks = []
    for part in parts:
        kind = "video" if part.endswith(".mp4") or part.startswith("data:video") else "image"
        is_medium = part.startswith(("data:", "http")) or part.endswith((".mp4", ".png", ".jpg"))
        medium = {"type": f"{kind}_url", f"{kind}_url": {"url": part}}
        blocks.append(medium if is_medium else {"type": "text", "text": part})
    return blocks


def user(*parts):
    return {"role": "user", "content": content(*parts)}


def assistant(text):
    return {"role": "assistant", "content": text}


def ask(served, *messages, **options):
    """What the server answers, whole."""
    options = {"model": "tiny", "max_tokens": 6, "temperature": 0} | options
    return served.client.chat.completions.create(messages=list(messages), **options)


def text_of(reply):
    return reply.choices[0].message.content.strip()


def metric(served, name, **labels):
    """The value of a counter or gauge."""
    return served.server.metrics.registry.get_sample_value(name, labels or None) or 0
