"""What the server has done, as Prometheus reads it; each app has a registry of its own."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .memory_cache import MemoryCache


class Metrics:
    """Counters, and a look into the cache whenever they are asked for.

    Args:
        queued: how many requests are under way.
    """

    def __init__(self, cache: MemoryCache, queued: Callable[[], int]):
        self._cache, self._queued = cache, queued
        self.registry = CollectorRegistry()
        self.registry.register(self)
        kept: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("vamba_requests", "Requests by status.", ["path", "status"], **kept)
        self.encodings = Counter("vamba_encodings", "Media encoded.", ["kind"], **kept)
        self.frames = Counter("vamba_frames_decoded", "Frames of videos that were decoded.", **kept)
        self.seconds = Counter("vamba_encoding_seconds", "Seconds spent encoding.", **kept)
        self.tokens = Counter("vamba_tokens_generated", "Tokens of answers.", **kept)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """For the registry: what the cache counts itself."""
        counts, sizes = self._cache.counts, self._cache.sizes()
        hits = CounterMetricFamily("vamba_cache_hits", "Memories found, by where.", labels=["place"])
        held = GaugeMetricFamily("vamba_cache_bytes", "Bytes of memories held, by where.", labels=["place"])
        for place in ("gpu", "cpu", "disk"):
            hits.add_metric([place], getattr(counts, place))
            held.add_metric([place], sizes[place])
        yield hits
        yield held
        yield CounterMetricFamily("vamba_cache_moved", "Memories moved from GPU to CPU.", value=counts.moved)
        yield CounterMetricFamily("vamba_cache_dropped", "Memories dropped from memory.", value=counts.dropped)
        yield GaugeMetricFamily("vamba_requests_under_way", "Requests that wait or are answered.", value=self._queued())
