"""The local provider over a scripted engine: text, stops, bills and cancels of each choice."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from galley.errors import BadModelFile, ContextLengthExceeded, GalleyError, InvalidRequest, Overloaded
from galley.model.model import Model
from galley.providers.base import Meter
from galley.providers.local import LocalProvider
from galley.providers.outbox import Outbox
from galley.runtime.meter import JobMeter
from galley.runtime.out import StepOut
from galley.types import Delta, Request, SamplingParams
from tests.tiny import tiny_gguf


class ScriptedEngine:
    """Says each choice's ids one a step; ``finish`` and ``cancel`` work as the engine's do."""

    def __init__(self, scripts: Iterable[list[int]], eos: int, *, step_s: float = 0.0) -> None:
        self.scripts = list(scripts)
        self.eos = eos
        self.step_s = step_s
        self.context = 256
        self.backend = SimpleNamespace(name="scripted", isa="none", fingerprint="s1")
        self.ended: dict[str, str] = {}
        self.said: dict[str, int] = {}
        self.asked: list[dict] = []
        self.full_at: int | None = None
        self.fault: GalleyError | None = None

    async def stream(
        self, job: str, prompt: list[int], params: SamplingParams, **more
    ) -> AsyncIterator[StepOut]:
        if self.full_at is not None and len(self.asked) >= self.full_at:
            raise Overloaded("full")
        script = self.scripts[len(self.asked) % len(self.scripts)]
        self.asked.append({"job": job, "prompt": prompt, "params": params, **more})
        meter = JobMeter(prompt_tokens=len(prompt), first_scheduled=0.0)
        for step, id in enumerate(script):
            await asyncio.sleep(self.step_s)
            if job in self.ended:
                break
            meter.completion_tokens += 1
            self.said[job] = step + 1
            finish = "stop" if id == self.eos else "length" if step + 1 == params.max_tokens else None
            yield StepOut(
                job_id=job,
                token_ids=[id],
                finish=finish,
                meter=meter if finish else None,
                cached_tokens=0 if step == 0 else None,
            )
            if finish:
                return
        how = self.ended.get(job)
        if how == "finish":
            yield StepOut(job_id=job, finish="stop", meter=meter)
        else:
            error = self.fault if how is None else GalleyError("cancelled", code="cancelled")
            yield StepOut(job_id=job, error=error or GalleyError("script over"), meter=meter)

    def finish(self, job: str) -> None:
        self.ended.setdefault(job, "finish")

    def cancel(self, job: str) -> None:
        self.ended.setdefault(job, "cancel")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    path: Path = tmp_path_factory.mktemp("m") / "tiny.gguf"
    opened = Model.open(tiny_gguf(path, "llama", seed=3), "tiny")
    yield opened
    opened.close()


def request(**changes) -> Request:
    fields = {
        "id": "req_1", "api": "completions", "model": "tiny", "params": SamplingParams(max_tokens=50),
        "created": 1.0, "prompts": ["hello"],
    }  # fmt: skip
    return Request(**(fields | changes))


async def run(provider: LocalProvider, asked: Request) -> tuple[list[Delta], Meter]:
    meter = Meter()
    prepared = await provider.prepare(asked)
    return [delta async for delta in provider.stream(prepared, meter)], meter


async def test_end_token_is_counted_not_shown(model):
    eos = model.tokenizer.eos_ids[0]
    ids = model.tokenizer.encode("bye now", add_bos=False)
    engine = ScriptedEngine([[*ids, eos]], eos)
    deltas, meter = await run(LocalProvider(model, engine), request())
    assert "".join(d.text for d in deltas) == "bye now" and deltas[-1].finish == "stop"
    assert meter.choices()[0].completion_tokens == len(ids) + 1 and deltas[-1].stop is None
    deltas, _ = await run(
        LocalProvider(model, ScriptedEngine([[*ids, eos]], eos)),
        request(params=SamplingParams(max_tokens=50, skip_special_tokens=False)),
    )
    assert "".join(d.text for d in deltas) == "bye now"


async def test_txt4_stop_string_finishes_the_job_and_drops_the_rest(model):
    ids = model.tokenizer.encode("one two three four five", add_bos=False)
    engine = ScriptedEngine([ids * 5], -1)
    params = SamplingParams(max_tokens=200, stop=["three"])
    deltas, meter = await run(LocalProvider(model, engine), request(params=params))
    assert "".join(d.text for d in deltas) == "one two " and deltas[-1].stop == "three"
    assert deltas[-1].finish == "stop"
    assert engine.ended == {"req_1/0": "finish"}
    kept = meter.choices()[0].completion_tokens
    assert kept == sum(len(d.token_ids) for d in deltas) < len(ids) and meter.jobs[0].prompt_tokens > 0


async def test_choices_of_prompts_get_their_lane_and_index(model):
    ids = model.tokenizer.encode("abc def", add_bos=False)
    engine = ScriptedEngine([ids], -1)
    asked = request(prompts=["x", "yy"], params=SamplingParams(n=2, max_tokens=3), priority=4, cache_salt="s")
    deltas, meter = await run(LocalProvider(model, engine), asked)
    assert [a["lane"] for a in engine.asked] == [0, 1, 0, 1] and engine.asked[0]["priority"] == 4
    assert {a["salt"] for a in engine.asked} == {"s"} and len({a["job"] for a in engine.asked}) == 4
    assert engine.asked[0]["prompt"] == engine.asked[1]["prompt"] != engine.asked[2]["prompt"]
    assert len({a["params"].seed for a in engine.asked}) == 1 and engine.asked[0]["params"].seed is not None
    assert sorted(meter.jobs) == [0, 1, 2, 3] and {d.index for d in deltas} == {0, 1, 2, 3}


async def test_can5_sch7_terms_of_a_request_reach_the_engine(model):
    engine = ScriptedEngine([model.tokenizer.encode("abc", add_bos=False)], -1)
    asked = request(
        params=SamplingParams(max_tokens=1), tenant="t", service_tier="priority",
        max_queue_s=2.0, max_total_s=9.0,
    )  # fmt: skip
    await run(LocalProvider(model, engine), asked)
    [seen] = engine.asked
    assert (seen["tenant"], seen["urgent"]) == ("t", True)
    assert (seen["max_queue_s"], seen["max_total_s"]) == (2.0, 9.0)
    await run(LocalProvider(model, engine), request(params=SamplingParams(max_tokens=1), service_tier="flex"))
    assert not engine.asked[-1]["urgent"]


def test_smp5_the_fingerprint_changes_with_whatever_may_change_the_ids(model, tmp_path):
    def fingerprint(of=model, **backend):
        engine = ScriptedEngine([], -1)
        engine.backend = SimpleNamespace(**({"name": "n", "isa": "i", "fingerprint": "f"} | backend))
        return LocalProvider(of, engine).fingerprint

    plain = fingerprint()
    assert plain == fingerprint()
    seen = {plain, fingerprint(fingerprint="f2"), fingerprint(isa="j"), fingerprint(name="m")}
    for number, change in enumerate(({"seed": 4}, {"vocab": 299}, {"template": "{{ messages }}"})):
        path = tiny_gguf(tmp_path / f"m{number}.gguf", "llama", **({"seed": 3} | change))
        with contextlib.closing(Model.open(path, "tiny")) as other:
            seen.add(fingerprint(other))
    assert len(seen) == 7


async def test_can1_leaving_early_still_brings_the_meters(model):
    ids = model.tokenizer.encode("a b c d e f g h", add_bos=False)
    engine = ScriptedEngine([ids * 20], -1, step_s=0.001)
    provider = LocalProvider(model, engine)
    meter = Meter()
    prepared = await provider.prepare(request(params=SamplingParams(n=2, max_tokens=100)))
    stream = provider.stream(prepared, meter)
    await anext(stream)
    await stream.aclose()
    assert set(engine.ended.values()) == {"cancel"} and sorted(meter.jobs) == [0, 1]
    assert all(said < 10 for said in engine.said.values())


async def test_refused_second_choice_cancels_the_first(model):
    engine = ScriptedEngine([[5] * 100], -1, step_s=0.001)
    engine.full_at = 1
    provider = LocalProvider(model, engine)
    prepared = await provider.prepare(request(params=SamplingParams(n=2, max_tokens=50)))
    with pytest.raises(Overloaded):
        await provider.start(prepared, Meter())
    assert engine.ended == {"req_1/0": "cancel"}


async def test_fault_comes_after_the_text_before_it(model):
    ids = model.tokenizer.encode("ok", add_bos=False)
    engine = ScriptedEngine([ids], -1)
    engine.fault = GalleyError("broken", code="engine_fault")
    provider = LocalProvider(model, engine)
    meter = Meter()
    seen = ""
    with pytest.raises(GalleyError, match="broken"):
        async for delta in provider.stream(await provider.prepare(request()), meter):
            seen += delta.text
    assert seen == "ok" and meter.jobs[0].completion_tokens == len(ids)


async def test_checks_before_anything_runs(model):
    provider = LocalProvider(model, ScriptedEngine([[1]], -1))
    with pytest.raises(ContextLengthExceeded) as long:
        await provider.prepare(request(prompts=["abc " * 300]))
    assert long.value.extra["n_ctx"] == 256 and long.value.param == "prompt"
    with pytest.raises(ContextLengthExceeded) as second:
        await provider.prepare(request(prompts=["a", "b"], params=SamplingParams(max_tokens=256)))
    assert second.value.param == "prompt[0]"
    with pytest.raises(InvalidRequest) as outside:
        await provider.prepare(request(prompts=[[1, -1]]))
    assert outside.value.param == "prompt[1]"
    with pytest.raises(InvalidRequest) as wrong:
        await provider.prepare(request(params=SamplingParams(top_p=7)))
    assert wrong.value.param == "top_p"
    prepared = await provider.prepare(request(params=SamplingParams()))
    assert prepared.max_tokens == [256 - len(prepared.prompts[0])] and prepared.params.seed is not None


async def test_large_prompts_are_tokenised_off_the_loop(model):
    engine = ScriptedEngine([[1]], -1)
    engine.context = 10**6
    provider = LocalProvider(model, engine)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticker = asyncio.ensure_future(tick())
    await provider.prepare(request(prompts=["word " * 100_000]))
    ticker.cancel()
    assert ticks > 3


async def test_can4_outbox_merges_what_nobody_reads():
    box = Outbox(1)
    for i in range(1000):
        box.put(Delta(index=0, text="x", token_ids=[i], finish="stop" if i == 999 else None))
    box.end()
    [merged] = await box.take()
    assert merged.text == "x" * 1000 and merged.token_ids == list(range(1000)) and merged.finish == "stop"
    assert await box.take() is None


async def test_what_the_request_leaves_open_is_the_models_choice(tmp_path):
    model = Model.open(tiny_gguf(tmp_path / "t.gguf"), "tiny")
    model.defaults = {"temperature": 0.3, "top_k": 7}
    provider = LocalProvider(model, ScriptedEngine([], eos=2))

    async def effective(left_open, **given):
        request = Request(
            id="r", api="t", model="tiny", params=SamplingParams(**given), created=0.0, prompts=["x"],
            left_open=left_open,
        )  # fmt: skip
        found = (await provider.prepare(request)).params
        return found.temperature, found.top_k, found.top_p

    assert await effective(["temperature", "top_p", "top_k", "min_p"]) == (0.3, 7, 1.0)
    assert await effective(["top_p"], temperature=1.0) == (1.0, 0, 1.0)
    assert await effective([]) == (1.0, 0, 1.0)
    model.close()


def test_defaults_out_of_range_are_the_files_fault(tmp_path):
    model = Model.open(tiny_gguf(tmp_path / "t.gguf"), "tiny")
    model.defaults = {"temperature": 7.0}
    with pytest.raises(BadModelFile, match=r"general\.sampling.*temperature"):
        LocalProvider(model, ScriptedEngine([], eos=2))
    model.close()
