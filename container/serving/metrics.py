"""The server's figures: Prometheus text for GET /metrics and CloudWatch embedded-metric lines for the log."""

import bisect
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence as Many

from container.serving.base_engine import BaseEngine
from container.serving.sequence import Sequence, Step

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Histogram:
    """Counts of values up to each bound, as Prometheus has them."""

    def __init__(self, bounds: Many[float] = SECONDS):
        self.bounds, self.counts = bounds, [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def lines(self, name: str) -> list[str]:
        lines, running = [], 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            running += count
            lines.append(f'{name}_bucket{{le="{bound:g}"}} {running}')
        lines.append(f'{name}_bucket{{le="+Inf"}} {self.count}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {self.count}"]


class Metrics:
    """Written by the engine's thread and the HTTP handlers, read by /metrics."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.http: Counter[tuple[str, int]] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.prompt_tokens = self.reused_tokens = self.output_tokens = 0
        self.first_token, self.per_token = Histogram(), Histogram()
        self.request_time, self.step_time = Histogram(), Histogram()
        self.gauges: dict[str, float] = {}
        self._recent: deque[float] = deque(maxlen=64)  # when the last requests finished
        self._told = (0, 0.0)  # tokens and seconds of steps at the last embedded line

    def response(self, path: str, status: int) -> None:
        with self._lock:
            self.http[path, status] += 1

    def step(self, engine: BaseEngine, steps: Many[Step], seconds: float) -> None:
        """Notes one engine step."""
        with self._lock:
            self.step_time.observe(seconds)
            self.output_tokens += sum(s.token_id is not None for s in steps)
        self.observe(engine)

    def observe(self, engine: BaseEngine) -> None:
        """Takes the engine's present state."""
        self.gauges = engine.gauges()

    def finished(self, sequence: Sequence) -> None:
        """Notes the end of a request, whatever it was."""
        now = time.monotonic()
        with self._lock:
            self.outcomes[sequence.finish_reason or "abort"] += 1
            self.prompt_tokens += len(sequence.prompt)
            self.reused_tokens += sequence.reused
            self.request_time.observe(now - sequence.arrived)
            self._recent.append(now)
            if sequence.first_token is not None and sequence.last_token is not None:
                self.first_token.observe(sequence.first_token - sequence.arrived)
                if len(sequence.output) > 1:
                    spent = sequence.last_token - sequence.first_token
                    self.per_token.observe(spent / (len(sequence.output) - 1))

    def finished_per_second(self) -> float:
        """Pace at which the last requests finished; 0 when there were fewer than two."""
        with self._lock:
            if len(self._recent) < 2:
                return 0.0
            return (len(self._recent) - 1) / max(1e-3, time.monotonic() - self._recent[0])

    def prometheus(self) -> str:
        """The text exposition format, version 0.0.4."""
        out: list[str] = []

        def metric(name: str, kind: str, meaning: str, lines: list[str]) -> None:
            out.extend((f"# HELP mla_{name} {meaning}", f"# TYPE mla_{name} {kind}", *lines))

        with self._lock:
            http = [
                f'mla_http_responses_total{{path="{_label(p)}",status="{s}"}} {n}'
                for (p, s), n in self.http.items()
            ]
            metric("http_responses_total", "counter", "HTTP responses.", http)
            ended = [f'mla_requests_total{{outcome="{o}"}} {n}' for o, n in self.outcomes.items()]
            metric("requests_total", "counter", "Generations that ended, by outcome.", ended)
            for name, value, meaning in (
                ("prompt_tokens_total", self.prompt_tokens, "Prompt tokens of finished requests."),
                ("prompt_tokens_reused_total", self.reused_tokens, "Prompt tokens found in the cache."),
                ("generated_tokens_total", self.output_tokens, "Tokens generated."),
            ):
                metric(name, "counter", meaning, [f"mla_{name} {value}"])
            for name, histogram, meaning in (
                ("time_to_first_token_seconds", self.first_token, "From arrival to the first token."),
                ("time_per_token_seconds", self.per_token, "Between tokens of a request, mean over it."),
                ("request_seconds", self.request_time, "From arrival to the end."),
                ("step_seconds", self.step_time, "One engine step."),
            ):
                metric(name, "histogram", meaning, histogram.lines(f"mla_{name}"))
        for name, gauge in self.gauges.items():
            metric(name, "gauge", name.replace("_", " ").capitalize() + ".", [f"mla_{name} {gauge:g}"])
        return "\n".join(out) + "\n"

    def embedded(self, model: str) -> str:
        """One CloudWatch embedded-metric line (namespace MlaServing) of the totals and gauges so far.

        TokensPerSecond: of the time since the last line in which the engine worked; absent when it did not.
        """
        with self._lock:
            tokens, seconds = self.output_tokens - self._told[0], self.step_time.total - self._told[1]
            self._told = self.output_tokens, self.step_time.total
            values = {
                "Requests": sum(self.outcomes.values()),
                "GeneratedTokens": self.output_tokens,
                "TimeToFirstTokenMean": self.first_token.total / max(1, self.first_token.count),
                "TimePerTokenMean": self.per_token.total / max(1, self.per_token.count),
            }
        values |= {
            "RequestsWaiting": self.gauges.get("requests_waiting", 0),
            "CachePagesUsed": self.gauges.get("cache_pages_used", 0),
        }
        if seconds > 0:
            values["TokensPerSecond"] = tokens / seconds
        units = {"TimeToFirstTokenMean": "Seconds", "TimePerTokenMean": "Seconds"}
        definitions = [{"Name": name, "Unit": units.get(name, "Count")} for name in values]
        directive = {"Namespace": "MlaServing", "Dimensions": [["Model"]], "Metrics": definitions}
        meta = {"Timestamp": int(time.time() * 1000), "CloudWatchMetrics": [directive]}
        return json.dumps({"_aws": meta, "Model": model, **values})


def _label(value: str) -> str:
    """A label's value as the text format wants it."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
