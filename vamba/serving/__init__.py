"""Serving: videos are encoded once and kept, whoever asks about them, and asked many times.

`app` is the server, `handlers` its routes, `gate` what every request passes first; `request_bodies` and `media` judge
what is asked, `memory_cache` keeps what was encoded, and `inference` is the thread on which the model works. `page` is
the web page, `sessions` its visitors, and `timeline` what it shows of where the model looked. Importing this package
imports nothing heavy.
"""
