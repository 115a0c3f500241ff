"""Serving: videos are encoded once and kept, whoever asks about them, and asked many times.

`memory_cache` keeps them on the GPU, in CPU memory and on disk. Importing this package imports nothing heavy.
"""
