"""Counts and times for Prometheus, under the names that dashboards and autoscalers of vLLM know."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quantkit.server.generation import Generation, Times
from quantkit.server.messages import Ready, Stats

LABEL = "model_name"
FIRST_TOKEN_BUCKETS = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
TOKEN_BUCKETS = (
    0.002,
    0.004,
    0.006,
    0.01,
    0.015,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
)
REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
COUNT_BUCKETS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
NOTHING = Stats(0, 0, 0.0, 0, 0, 0)


class Metrics:
    """All of one server, each with the model's name."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(model_name)
        self._registry.register(self._engine)
        self._model_name = model_name
        self._first_token = self._histogram("time_to_first_token_seconds", FIRST_TOKEN_BUCKETS)
        self._between_tokens = self._histogram("inter_token_latency_seconds", TOKEN_BUCKETS)
        self._per_token = self._histogram("request_time_per_output_token_seconds", TOKEN_BUCKETS)
        self._whole = self._histogram("e2e_request_latency_seconds", REQUEST_BUCKETS)
        self._queue = self._histogram("request_queue_time_seconds", REQUEST_BUCKETS)
        self._prefill = self._histogram("request_prefill_time_seconds", REQUEST_BUCKETS)
        self._decode = self._histogram("request_decode_time_seconds", REQUEST_BUCKETS)
        self._prompt_tokens = self._histogram("request_prompt_tokens", COUNT_BUCKETS)
        self._answer_tokens = self._histogram("request_generation_tokens", COUNT_BUCKETS)
        self._answers = self._histogram("request_params_n", (1, 2, 4, 8, 16))
        self._total_prompt = self._counter("vllm:prompt_tokens")
        self._total_answer = self._counter("vllm:generation_tokens")
        self._success = self._counter("vllm:request_success", "finished_reason")
        self._responses = self._counter("quantkit:http_responses", "path", "status")

    def ready(self, engine: Ready) -> None:
        """What the engine was started with."""
        self._engine.ready = engine

    def stepped(self, stats: Stats) -> None:
        """The engine after a step."""
        self._engine.stats = stats

    def began(self, num_prompt_tokens: int) -> None:
        """A prompt of so many tokens waits no longer."""
        self._total_prompt.inc(num_prompt_tokens)

    def generated(self, num_tokens: int) -> None:
        """So many tokens came, of one prompt: counted now, since rates of a long answer would be 0, then a peak."""
        self._total_answer.inc(num_tokens)

    def got_first_token(self, times: Times) -> None:
        """A request got its first token, at a time of its own."""
        assert times.first_token is not None, "that is when"
        self._first_token.observe(times.first_token - times.arrival)

    def got_token(self, seconds: float) -> None:
        """A request got more tokens, so long after the ones before."""
        self._between_tokens.observe(seconds)

    def ended(self, generation: Generation, now: float) -> None:
        """A request has ended, in whatever way."""
        arrival, begun, first, last = generation.times
        if begun is not None:
            self._queue.observe(begun - arrival)
        if generation.error is not None or begun is None or first is None or last is None:
            return
        for reason in generation.finish_reasons:
            self._success.labels(self._model_name, reason).inc()
        self._whole.observe(now - arrival)
        self._prefill.observe(first - begun)
        self._decode.observe(last - first)
        num_later = generation.num_tokens / generation.num_choices - 1
        if num_later > 0:
            self._per_token.observe((last - first) / num_later)
        self._prompt_tokens.observe(generation.num_prompt_tokens)
        self._answer_tokens.observe(generation.num_tokens)
        self._answers.observe(generation.num_answers)

    def responded(self, path: str, status: int) -> None:
        """A response has ended. path: one of the server's own."""
        self._responses.labels(self._model_name, path, str(status)).inc()

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", _help(name), [LABEL], registry=self._registry, buckets=buckets)
        return histogram.labels(self._model_name)

    def _counter(self, name: str, *labels: str) -> Counter:
        counter = Counter(name, _help(name), [LABEL, *labels], registry=self._registry)
        return counter if labels else counter.labels(self._model_name)


class _EngineCollector(Collector):
    """What the engine says of itself, as it was after its last step."""

    def __init__(self, model_name: str) -> None:
        self.stats = NOTHING
        self.ready: Ready | None = None
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        for name, value in (
            ("num_requests_running", stats.num_running),
            ("num_requests_waiting", stats.num_waiting),
            ("kv_cache_usage_perc", stats.kv_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", _help(name), labels=[LABEL])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, count in (
            ("prefix_cache_queries", stats.num_prefix_queries),
            ("prefix_cache_hits", stats.num_prefix_hits),
            ("num_preemptions", stats.num_preemptions),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", _help(name), labels=[LABEL])
            counter.add_metric([self._model_name], count)
            yield counter
        if self.ready is not None:
            yield self._cache_info(self.ready)

    def _cache_info(self, engine: Ready) -> Metric:
        labels = {
            "block_size": str(engine.block_size),
            "num_gpu_blocks": str(engine.num_kv_tokens // engine.block_size),
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=[LABEL, *labels])
        info.add_metric([self._model_name, *labels.values()], 1)
        return info


def _help(name: str) -> str:
    return name.removeprefix("vllm:").removeprefix("quantkit:").replace("_", " ").capitalize() + "."
