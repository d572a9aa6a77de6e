"""Prometheus text, written by hand: vLLM's names, so that its dashboards work, fed from receipts and load."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from galley.providers.base import Load
from galley.types import Receipt

__all__ = ["Histogram", "Metrics"]

TTFT = (
    0.001,
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
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
ITL = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
LONG = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "vllm:time_to_first_token_seconds": ("Arrival to first token.", TTFT),
    "vllm:inter_token_latency_seconds": ("Mean seconds between tokens of a request.", ITL),
    "vllm:time_per_output_token_seconds": ("Older name of inter_token_latency_seconds.", ITL),
    "vllm:e2e_request_latency_seconds": ("Arrival to end.", LONG),
    "vllm:request_queue_time_seconds": ("Arrival to first scheduled step.", LONG),
    "vllm:request_prefill_time_seconds": ("First scheduled step to first token.", LONG),
    "vllm:request_decode_time_seconds": ("First token to last token.", LONG),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", TOKENS),
    "vllm:request_generation_tokens": ("Completion tokens of a request.", TOKENS),
}


def escape(value: str) -> str:
    """A label value."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def labels(**pairs: str) -> str:
    """``{a="x",b="y"}``, or nothing."""
    return "{" + ",".join(f'{k}="{escape(v)}"' for k, v in pairs.items()) + "}" if pairs else ""


class Histogram:
    """Counts by upper bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """O(log bounds)."""
        self.sum += value
        self.counts[bisect_left(self.bounds, value)] += 1

    def lines(self, name: str, model: str) -> Iterable[str]:
        """Cumulative buckets, sum and count."""
        total = 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            total += count
            yield f"{name}_bucket{labels(model_name=model, le=repr(float(bound)))} {total}"
        total += self.counts[-1]
        yield f"{name}_bucket{labels(model_name=model, le='+Inf')} {total}"
        yield f"{name}_sum{labels(model_name=model)} {self.sum!r}"
        yield f"{name}_count{labels(model_name=model)} {total}"


class Metrics:
    """Counters and histograms since start. ``observe`` is a listener of receipts.

    Labels are model names that are served, statuses and error codes: never what a client may invent.
    """

    def __init__(self) -> None:
        self._histograms: dict[tuple[str, str], Histogram] = {}
        self._counters: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def observe(self, receipt: Receipt) -> None:
        """Count one request. A request that found no model counts under the model name ``""``."""
        model = receipt.route.model if receipt.route else ""
        times, usage = receipt.times, receipt.usage
        self.count("galley:requests_total", model_name=model, status=receipt.status)
        if receipt.error is not None:
            self.count("galley:errors_total", model_name=model, code=str(receipt.error.get("code")))
        if receipt.ignored_params:
            self.count("galley:requests_with_ignored_params_total", model_name=model)
        if receipt.route is None:
            return
        self.count("vllm:prompt_tokens_total", usage.prompt_tokens, model_name=model)
        self.count("vllm:generation_tokens_total", usage.completion_tokens, model_name=model)
        self.count("galley:cached_tokens_total", usage.cached_tokens, model_name=model)
        self.count("galley:cache_query_tokens_total", usage.prompt_tokens, tenant=receipt.tenant)
        self.count("galley:cache_hit_tokens_total", usage.cached_tokens, tenant=receipt.tenant)
        self.count("galley:prefill_flop_total", receipt.resources.prefill_flop, model_name=model)
        self.count("galley:decode_bytes_total", receipt.resources.decode_bytes, model_name=model)
        self.count("galley:kv_byte_seconds_total", receipt.resources.kv_byte_seconds, model_name=model)
        reasons = [choice.finish for choice in receipt.choices]
        if receipt.status == "ok":
            for reason in reasons:
                self.count("vllm:request_success_total", model_name=model, finished_reason=str(reason))
        elif receipt.status in ("cancelled", "disconnected"):
            self.count("vllm:request_success_total", model_name=model, finished_reason="abort")
        if times.ttft_s is None:
            return  # nothing was generated: no latency to speak of
        self.time("vllm:time_to_first_token_seconds", model, times.ttft_s)
        if times.itl_mean_s is not None:
            self.time("vllm:inter_token_latency_seconds", model, times.itl_mean_s)
            self.time("vllm:time_per_output_token_seconds", model, times.itl_mean_s)
        self.time("vllm:e2e_request_latency_seconds", model, times.total_s)
        self.time("vllm:request_queue_time_seconds", model, times.queue_s)
        self.time("vllm:request_prefill_time_seconds", model, times.prefill_s)
        self.time("vllm:request_decode_time_seconds", model, times.decode_s)
        self.time("vllm:request_prompt_tokens", model, usage.prompt_tokens)
        self.time("vllm:request_generation_tokens", model, usage.completion_tokens)

    def count(self, name: str, by: float = 1, **pairs: str) -> None:
        """Add to a counter."""
        key = (name, tuple(pairs.items()))
        self._counters[key] = self._counters.get(key, 0) + by

    def time(self, name: str, model: str, value: float) -> None:
        """Add to a histogram."""
        key = (name, model)
        if key not in self._histograms:
            self._histograms[key] = Histogram(HISTOGRAMS[name][1])
        self._histograms[key].observe(value)

    def render(self, loads: dict[str, Load], gauges: dict[str, float]) -> str:
        """The exposition text. ``loads`` by model; ``gauges`` are further single values by name."""
        out: list[str] = []
        for name, sort, read in LOAD_METRICS:
            out.append(f"# TYPE {name} {sort}")
            out += [f"{name}{labels(model_name=model)} {read(load)}" for model, load in loads.items()]
        if loads:
            out.append("# TYPE vllm:cache_config_info gauge")
        for model, load in loads.items():
            pairs = labels(
                model_name=model, block_size=str(load.block_size), num_gpu_blocks=str(load.blocks_total)
            )
            out.append(f"vllm:cache_config_info{pairs} 1")
        for name, value in gauges.items():
            out.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
            out.append(f"{name} {value}")
        counters = sorted((n, labels(**dict(pairs)), value) for (n, pairs), value in self._counters.items())
        for name in dict.fromkeys(name for name, _, _ in counters):
            out.append(f"# TYPE {name} counter")
            out += [
                f"{n}{pairs} {value:g}" if value < 1e6 else f"{n}{pairs} {value!r}"
                for n, pairs, value in counters
                if n == name
            ]
        for name, (words, _) in HISTOGRAMS.items():
            out += [f"# HELP {name} {words}", f"# TYPE {name} histogram"]
            for (n, model), histogram in self._histograms.items():
                if n == name:
                    out += histogram.lines(name, model)
        return "\n".join(out) + "\n"


LOAD_METRICS: tuple[tuple[str, str, Callable[[Load], float]], ...] = (
    ("vllm:num_requests_running", "gauge", lambda load: load.running),
    ("vllm:num_requests_waiting", "gauge", lambda load: load.waiting),
    ("vllm:kv_cache_usage_perc", "gauge", lambda load: load.kv_usage),
    ("vllm:gpu_cache_usage_perc", "gauge", lambda load: load.kv_usage),
    ("vllm:prefix_cache_queries_total", "counter", lambda load: load.prefix_queries),
    ("vllm:prefix_cache_hits_total", "counter", lambda load: load.prefix_hits),
    ("vllm:num_preemptions_total", "counter", lambda load: load.preemptions),
    ("galley:steps_total", "counter", lambda load: load.steps),
    ("galley:computed_tokens_total", "counter", lambda load: load.computed),
    ("galley:recomputed_tokens_total", "counter", lambda load: load.recomputed),
    ("galley:step_faults_total", "counter", lambda load: load.faults),
    ("galley:invariant_violations_total", "counter", lambda load: load.violations),
    ("galley:kv_disk_limit_bytes", "gauge", lambda load: load.disk_limit),
    ("galley:kv_disk_bytes", "gauge", lambda load: load.disk_bytes),
    ("galley:kv_disk_kept_bytes", "gauge", lambda load: load.disk_kept_bytes),
    ("galley:kv_disk_hit_tokens_total", "counter", lambda load: load.disk_hits),
    ("galley:kv_disk_saved_blocks_total", "counter", lambda load: load.disk_saved),
    ("galley:kv_disk_evicted_blocks_total", "counter", lambda load: load.disk_evicted),
    ("galley:kv_disk_damaged_blocks_total", "counter", lambda load: load.disk_damaged),
    ("galley:kv_disk_refused_total", "counter", lambda load: load.disk_refused),
    ("galley:kv_disk_failures_total", "counter", lambda load: load.disk_failures),
    ("galley:predicted_steps_total", "counter", lambda load: load.predicted_steps),
    ("galley:step_seconds_total", "counter", lambda load: load.step_seconds),
    ("galley:step_predicted_seconds_total", "counter", lambda load: load.step_predicted_seconds),
    ("galley:step_prediction_error_seconds_total", "counter", lambda load: load.step_error_seconds),
    ("galley:kv_blocks_free", "gauge", lambda load: load.blocks_free),
    ("galley:kv_blocks", "gauge", lambda load: load.blocks_total),
)
