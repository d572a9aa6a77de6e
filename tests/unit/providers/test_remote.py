"""Providers over HTTP, against a real server that behaves well and badly."""

import asyncio

import pytest

from galley.errors import Upstream
from galley.providers.anthropic import AnthropicDialect
from galley.providers.base import Meter
from galley.providers.carries import lacks
from galley.providers.dialect import Timeouts
from galley.providers.http import Pool
from galley.providers.openai import OpenAIDialect
from galley.providers.refusal import retry_after
from galley.providers.remote import RemoteProvider, share
from galley.providers.sse import Events
from galley.types import Request, SamplingParams
from tests.upstream import WORDS, MockUpstream


def request(**changes):
    fields = {
        "id": "req_1",
        "api": "chat.completions",
        "model": "big",
        "params": SamplingParams(),
        "created": 1.0,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Six by seven?"},
        ],
    }
    return Request(**(fields | changes))


def provider(up, dialect=None, **options):
    options.setdefault("timeouts", Timeouts(first=30, idle=30))  # a busy machine is no stall
    return RemoteProvider(
        "cloud",
        Pool(up.url),
        dialect or OpenAIDialect("cloud"),
        {"big": ("gpt-x", 8192)},
        key="sk-1",
        **options,
    )


async def ask(up, dialect=None, options=None, **changes):
    """Text, meter."""
    way = provider(up, dialect, **(options or {}))
    meter = Meter()
    run = await way.start(await way.prepare(request(**changes)), meter)
    try:
        text = "".join([delta.text async for delta in run.deltas()])
    finally:
        await run.stop()
        way.close()
    return text, meter


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_and_its_usage(stream):
    async with MockUpstream() as up:
        text, meter = await ask(up, stream=stream)
    assert text == "".join(WORDS) and meter.finish == {0: "stop"} and not meter.estimated
    assert meter.jobs[0].prompt_tokens == 11 and meter.kept[0] == len(WORDS)
    path, body = up.bodies[0]
    assert path == "/v1/chat/completions" and body["model"] == "gpt-x"
    assert up.headers[0]["authorization"] == "bearer sk-1" and up.headers[0]["idempotency-key"] == "req_1-big"
    assert bool(body.get("stream")) is stream


@pytest.mark.parametrize("stream", [False, True])
async def test_anthropic(stream):
    async with MockUpstream() as up:
        text, meter = await ask(up, AnthropicDialect("cloud"), stream=stream)
    assert text == "".join(WORDS)
    path, body = up.bodies[0]
    assert path == "/v1/messages" and body["system"] == "Be brief." and len(body["messages"]) == 1
    assert up.headers[0]["x-api-key"] == "sk-1" and body["max_tokens"] == 4096
    # 7 fresh, 3 read from the cache, 1 written: our prompt tokens include all
    used = meter.jobs[0]
    assert (used.prompt_tokens, used.cached_tokens, used.cache_write_tokens) == (11, 3, 1)


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        ("refuse", "server"),
        ("overload", "server"),
        ("limit", "rate"),
        ("auth", "auth"),
        ("bad", "request"),
        ("stall", "timeout"),
        ("garbage", "protocol"),
        ("error200", "server"),
        ("empty", "protocol"),
        ("drop", "network"),
        ("cut", "network"),
    ],
)
async def test_failures_before_the_commit_point_have_a_class(behaviour, kind):
    wait = 0.3 if behaviour == "stall" else 30
    async with MockUpstream(script=[behaviour]) as up:
        with pytest.raises(Upstream) as caught:
            await ask(up, options={"timeouts": Timeouts(first=wait, idle=wait)})
    assert caught.value.kind == kind and "cloud" in caught.value.message
    assert "sk-1" not in str(caught.value.body())
    if behaviour == "limit":
        assert caught.value.retry_after_s == 1.0
    if behaviour == "auth":
        assert "by mock" not in caught.value.message, "what an upstream says of our key is not the client's"


@pytest.mark.parametrize("behaviour", ["cut", "eof"])
async def test_a_stream_that_breaks_off_is_never_a_clean_end(behaviour):
    async with MockUpstream(script=[behaviour], gap_s=0.01) as up:
        way = provider(up)
        run = await way.start(await way.prepare(request(stream=True)), Meter())
        got = ""
        with pytest.raises(Upstream) as caught:
            async for delta in run.deltas():
                got += delta.text
        await run.stop()
    assert caught.value.kind == "cut" and got == "".join(WORDS[:3])


async def test_silence_in_mid_answer_ends_it():
    async with MockUpstream(gap_s=5) as up:
        with pytest.raises(Upstream, match="nothing came"):
            await ask(up, options={"timeouts": Timeouts(first=30, idle=0.3)}, stream=True)


async def test_slow_stream_guard_holds_the_answer_back():
    guard = {"timeouts": Timeouts(first=30, idle=30, slow_chars=1000, slow_s=0.1)}
    async with MockUpstream(gap_s=0.2) as up:
        way = provider(up, **guard)
        with pytest.raises(Upstream, match="slow"):
            await way.start(await way.prepare(request(stream=True)), Meter())
    async with MockUpstream() as up:
        assert (await ask(up, options=guard, stream=True))[0] == "".join(WORDS)


async def test_can1_stop_cuts_the_connection():
    async with MockUpstream(gap_s=0.05) as up:
        way = provider(up)
        run = await way.start(await way.prepare(request(stream=True)), Meter())
        async for _ in run.deltas():
            break
        await run.stop()
        for _ in range(50):
            await asyncio.sleep(0.02)
            if not up.open:
                break
        assert not up.open and way.load().running == 0


async def test_connections_are_kept_and_stale_ones_replaced():
    async with MockUpstream() as up:
        way = provider(up)

        async def once():
            run = await way.start(await way.prepare(request()), Meter())
            assert "".join([d.text async for d in run.deltas()]) == "".join(WORDS)
            await run.stop()

        await once()
        first = way.pool._idle[0]
        await once()
        assert way.pool._idle == [first] and first.used == 2
        for writer in list(up.open):
            writer.transport.abort()  # the server's idle timeout, unnoticed by us
        await once()
        assert way.pool._idle != [first]
        assert await way.healthy(1.0)
        way.close()
    assert not await way.healthy(0.5)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_survive_any_split(size):
    raw = b": hello\r\nevent: a\r\ndata: one\r\ndata: two\r\n\r\ndata:3\n\nid: 9\n\ndata: \xe2\x82\xac\r\r"
    raw += b"data: last\n\n"
    events = Events()
    found = [pair for at in range(0, len(raw), size) for pair in events.feed(raw[at : at + size])]
    assert found == [("a", b"one\ntwo"), ("", b"3"), ("", "€".encode()), ("", b"last")]


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"logit_bias": {1: 2.0}}, "logit_bias"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
    ],
)
def test_what_cannot_be_carried_is_refused_not_dropped(params, word):
    assert word in (lacks(request(params=SamplingParams(**params)), "openai") or "")
    assert lacks(request(), "openai") is None
    assert lacks(request(params=SamplingParams(top_k=5)), "openai-extended") is None


def test_retry_after_in_every_form():
    assert retry_after({"retry-after": "2"}) == 2.0
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None


def test_share_is_exact():
    assert share(10, [1, 1, 1]) == [4, 3, 3] and share(5, [0, 0]) == [5, 0] and share(0, [3]) == [0]


def test_a_provider_answers_under_the_loop_that_serves():
    """uvloop's transports are no asyncio.Transport by inheritance; the server runs on it."""
    uvloop = pytest.importorskip("uvloop")

    async def exchange():
        async with MockUpstream() as up:
            reply = await Pool(up.url).request("GET", "/models", {})
            return reply.status, await reply.read(1 << 20)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status, body = runner.run(exchange())
    assert status == 200 and body
