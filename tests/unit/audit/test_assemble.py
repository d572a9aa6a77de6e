"""The arithmetic of a receipt."""

from dataclasses import dataclass

import msgspec
import pytest

from galley.audit.assemble import assemble, receipt_id
from galley.errors import ContextLengthExceeded
from galley.types import Choice, Digests, Receipt, Request, Route, SamplingParams


@dataclass
class Meter:
    prompt_tokens: int = 10
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    cache_ends: tuple[tuple[int, int], ...] = ()
    completion_tokens: int = 0
    arrived: float = 100.0
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    itl_max_s: float | None = None
    steps: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    prefill_flop: float = 0.0
    decode_bytes: float = 0.0
    kv_byte_seconds: float = 0.0


def request(**changes: object) -> Request:
    fields = {
        "id": "req_1",
        "api": "completions",
        "model": "m",
        "params": SamplingParams(),
        "created": 1.5,
        "prompts": ["a", "b"],
    }
    return Request(**(fields | changes))


def make(**changes: object) -> Receipt:
    fields = {
        "receipt_id": "rcp_x",
        "request": request(),
        "route": Route(model="m", provider="local", rule="fixed"),
        "digests": Digests(weights="w"),
        "meters": {},
        "status": "ok",
    }
    return assemble(**(fields | changes))


def test_prompt_counts_once_for_all_its_choices_and_once_per_prompt():
    meters = {
        0: Meter(prompt_tokens=10, cached_tokens=0, completion_tokens=3, first_scheduled=101.0),
        1: Meter(prompt_tokens=10, cached_tokens=9, completion_tokens=4, first_scheduled=101.0),
        2: Meter(prompt_tokens=7, cached_tokens=2, completion_tokens=5, first_scheduled=101.0),
        3: Meter(prompt_tokens=7, cached_tokens=6, completion_tokens=6, first_scheduled=101.0),
    }
    usage = make(request=request(params=SamplingParams(n=2)), meters=meters).usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (17, 2, 18)
    assert usage.total_tokens == 35


def test_choice_that_never_ran_does_not_hide_the_cached_tokens():
    meters = {0: Meter(cached_tokens=8, first_scheduled=101.0), 1: Meter(cached_tokens=0)}
    assert make(request=request(params=SamplingParams(n=2)), meters=meters).usage.cached_tokens == 8


def test_txt4_kept_tokens_are_billed_not_generated_ones():
    receipt = make(
        meters={0: Meter(completion_tokens=9)}, choices=[Choice(index=0, completion_tokens=7, finish="stop")]
    )
    assert receipt.usage.completion_tokens == 7


def test_times_come_from_the_earliest_and_the_latest_choice():
    meters = {
        0: Meter(
            arrived=100.0,
            first_scheduled=101.0,
            first_token=103.0,
            last_token=105.0,
            finished=105.5,
            completion_tokens=5,
            itl_max_s=0.9,
        ),
        1: Meter(
            arrived=100.1,
            first_scheduled=102.0,
            first_token=102.5,
            last_token=107.5,
            finished=108.0,
            completion_tokens=6,
            itl_max_s=1.5,
        ),
    }
    times = make(meters=meters).times
    assert times.queue_s == pytest.approx(1.0)
    assert times.prefill_s == pytest.approx(1.5)
    assert times.ttft_s == pytest.approx(2.5)
    assert times.decode_s == pytest.approx(5.0)
    assert times.itl_mean_s == pytest.approx((2.0 + 5.0) / (4 + 5))
    assert times.itl_max_s == 1.5
    assert times.total_s == pytest.approx(8.0)


def test_one_token_has_no_inter_token_latency():
    meters = {0: Meter(first_token=101.0, last_token=101.0, completion_tokens=1, itl_max_s=0.0)}
    times = make(meters=meters).times
    assert times.itl_mean_s is None and times.itl_max_s is None


def test_refused_request_has_its_error_and_its_own_times():
    error = ContextLengthExceeded(prompt_tokens=900, max_tokens=200, context=1000, param="messages")
    receipt = make(status="error", error=error, route=None, digests=None, started=5.0, ended=5.25)
    assert receipt.error is not None
    assert receipt.error["code"] == "context_length_exceeded"
    assert (receipt.error["n_prompt_tokens"], receipt.error["n_ctx"], receipt.error["max_tokens"]) == (
        900,
        1000,
        200,
    )
    assert receipt.error["status"] == 400
    assert receipt.times.total_s == 0.25 and receipt.times.ttft_s is None
    assert receipt.usage.total_tokens == 0 and receipt.model == "m"


def test_resources_are_sums_over_choices():
    meters = {i: Meter(steps=2, computed_tokens=5, prefill_flop=1e9, kv_byte_seconds=0.5) for i in range(3)}
    resources = make(meters=meters).resources
    assert (resources.steps, resources.computed_tokens) == (6, 15)
    assert (resources.prefill_flop, resources.kv_byte_seconds) == (3e9, 1.5)


def test_text_is_kept_only_under_capture():
    kept = make(request=request(capture=True), output=["x"])
    assert kept.prompt == ["a", "b"] and kept.output == ["x"]
    left = make(output=["x"])
    assert left.prompt is None and left.output is None


def test_the_seed_used_is_on_the_receipt():
    assert make(seeds=[7]).params["seed"] == 7
    assert make(seeds=[7, 8]).params["seeds"] == [7, 8]


def test_ids_sort_by_time_and_do_not_repeat():
    early, late = receipt_id(1000.0), receipt_id(1000.001)
    assert early < late and len(early) == 30 and early.startswith("rcp_")
    assert len({receipt_id(1000.0) for _ in range(1000)}) == 1000


def test_receipt_survives_json():
    receipt = make(meters={0: Meter(completion_tokens=2)}, error=ValueError("x"))
    assert msgspec.json.decode(msgspec.json.encode(receipt), type=Receipt) == receipt
