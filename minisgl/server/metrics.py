"""What the server measures of itself: Prometheus metrics with SGLang's names and meanings, and figures for the page.

    https://docs.sglang.ai/references/production_metrics.html

Knows numbers. Does not know where they come from.
"""

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minisgl.request import Usage
from minisgl.server.protocol import Stats

# Seconds.
TTFT_BUCKETS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100)
ITL_BUCKETS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.5, 1, 2)
E2E_BUCKETS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400, 800)
RECENT = 100  # requests that count as recent
RATE_WINDOW_S = 5.0


class Timer:
    """The clock of one answer."""

    def __init__(self, metrics: "Metrics", arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._last: float | None = None
        self._ended = False

    def tick(self, num_tokens: int) -> None:
        """That many tokens have come."""
        if not num_tokens:
            return
        now = time.monotonic()
        if self._last is None:
            self._metrics.ttft.observe(now - self._arrival)
        else:
            for _ in range(num_tokens):  # what came together, came evenly
                self._metrics.itl.observe((now - self._last) / num_tokens)
        self._last = now
        self._metrics.count_output(num_tokens, now)

    def end(self, usage: Usage) -> None:
        """The answer is whole."""
        self._ended = True
        self._metrics.count_answer(usage, time.monotonic() - self._arrival)

    def close(self) -> None:
        """Nothing more comes."""
        if not self._ended:
            self._metrics.num_aborted_requests.inc()


class Metrics(Collector):
    """All metrics of a server. `stats` of the engine are set by whoever reads the metrics."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        own: dict[str, Any] = {"labelnames": ["model_name"], "registry": self.registry}

        def histogram(name: str, help: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"minisgl:{name}", help, buckets=tuple(buckets), **own).labels(model)

        def counter(name: str, help: str) -> Counter:
            return Counter(f"minisgl:{name}", help, **own).labels(model)

        self.ttft = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", TTFT_BUCKETS
        )
        self.itl = histogram("inter_token_latency_seconds", "From one token of an answer to the next.", ITL_BUCKETS)
        self.e2e = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", E2E_BUCKETS)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered requests.")
        self.cached_tokens = counter("cached_tokens", "Of these, found in the prefix cache.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.num_requests = counter("num_requests", "Answered requests.")
        self.num_aborted_requests = counter(
            "num_aborted_requests", "Requests that ended before their answer was whole."
        )
        self.stats = Stats()
        self._recent: deque[tuple[Usage, float]] = deque(maxlen=RECENT)
        self._tokens: deque[tuple[float, int]] = deque()  # (when, how many)
        self.registry.register(self)

    def timer(self, arrival: float) -> Timer:
        """`arrival` by time.monotonic()."""
        return Timer(self, arrival)

    def count_output(self, num_tokens: int, now: float) -> None:
        self.generation_tokens.inc(num_tokens)
        if self._tokens and now - self._tokens[-1][0] < 0.1:  # few entries, however many tokens
            when, before = self._tokens.pop()
            self._tokens.append((when, before + num_tokens))
        else:
            self._tokens.append((now, num_tokens))
        while self._tokens and self._tokens[0][0] < now - RATE_WINDOW_S:
            self._tokens.popleft()

    def count_answer(self, usage: Usage, latency_s: float) -> None:
        self.e2e.observe(latency_s)
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.cached_tokens.inc(usage.cached_tokens)
        self.num_requests.inc()
        self._recent.append((usage, latency_s))

    @property
    def recent_latency_s(self) -> float:
        """Mean of the latest answers, from arrival to end."""
        return sum(latency for _, latency in self._recent) / max(len(self._recent), 1)

    @property
    def cache_hit_rate(self) -> float:
        """Of the prompt tokens of the latest answers, those that the cache had."""
        prompt = sum(usage.prompt_tokens for usage, _ in self._recent)
        return sum(usage.cached_tokens for usage, _ in self._recent) / max(prompt, 1)

    @property
    def tokens_per_s(self) -> float:
        """Generated in the last seconds."""
        since = time.monotonic() - RATE_WINDOW_S
        return sum(count for when, count in self._tokens if when >= since) / RATE_WINDOW_S

    def figures(self) -> dict[str, tuple[float, str]]:
        """What changes from moment to moment, each with what it is. What only the cache holds counts as free."""
        stats = self.stats
        used, capacity = stats.capacity - stats.free - stats.cached, max(stats.capacity, 1)
        return {
            "num_running_reqs": (stats.running, "Answers that run."),
            "num_queue_reqs": (stats.waiting, "Answers that wait for a place."),
            "num_used_tokens": (used, "Tokens whose KV running requests hold."),
            "max_total_num_tokens": (stats.capacity, "Tokens whose KV fits."),
            "token_usage": (used / capacity, "Share of the KV that running requests hold."),
            "cached_usage": (stats.cached / capacity, "Share of the KV that only the prefix cache holds."),
            "cache_hit_rate": (self.cache_hit_rate, f"Of the latest {RECENT} answers' prompt tokens, the cached ones."),
            "gen_throughput": (self.tokens_per_s, "Tokens generated per second."),
            "num_retracted_reqs": (stats.preemptions, "Times that a running answer had to give up its KV."),
        }

    def collect(self) -> Iterable[Metric]:
        """The gauges, for Prometheus."""
        for name, (value, help) in self.figures().items():
            family = GaugeMetricFamily(f"minisgl:{name}", help, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
