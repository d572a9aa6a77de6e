"""Prompt caching as clients see it: keys, breakpoints with lifetimes, usage, receipts, metrics; and pins."""

import json
import time

import httpx
import pytest
from click.testing import CliRunner

from galley.cli.main import galley
from galley.types import SamplingParams

SYSTEM = "You are a harbour master. " * 12
B = 16


@pytest.fixture
def served(tiny_serve):
    server = tiny_serve(disk_bytes=16 << 20)
    with httpx.Client(base_url=server.url, timeout=30) as http:
        yield server, http


def chat(http, *, parts=None, text="When is high tide?", **more):
    system = SYSTEM if parts is None else parts
    body = {
        "model": "tiny",
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": text}],
        "max_tokens": 3,
        "temperature": 0,
        **more,
    }
    answer = http.post("/v1/chat/completions", json=body)
    receipt = http.get(f"/v1/receipts/{answer.headers['x-galley-receipt']}").json()
    return answer, receipt


def until(what, seconds=20):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "never"
        time.sleep(0.01)


def marked(ttl=None, **spelling):
    control = {"type": "ephemeral", **({"ttl": ttl} if ttl else {})}
    return [{"type": "text", "text": SYSTEM, **(spelling or {"cache_control": control})}]


def test_a_breakpoint_is_held_on_disk_and_reported(served):
    server, http = served
    answer, receipt = chat(http, parts=marked("1h"))
    details = answer.json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == 0
    assert details["cache_write_tokens"] == receipt["usage"]["cache_write_tokens"] > B
    held = receipt["usage"]["cache_write_ttl"]["1h"]
    assert B <= held <= details["cache_write_tokens"]
    assert "x-galley-clamped" not in answer.headers
    store = server.engine.disk
    until(store.records)
    (record,) = store.records()
    assert record.tokens == held // B * B
    assert 3500 < record.until - time.time() <= 3600
    again, receipt = chat(http, parts=marked("1h"), text="And low tide?")
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= record.tokens
    assert receipt["usage"]["cache_write_ttl"] == {}


def test_the_breakpoint_ends_where_its_part_ends(served):
    """Two parts, the first marked: what is held is common to prompts that differ in the second."""
    server, http = served
    parts = [*marked(), {"type": "text", "text": "Answer in one word. " * 8}]
    chat(http, parts=parts)
    until(server.engine.disk.records)
    (record,) = server.engine.disk.records()
    whole = http.post("/tokenize", json={"model": "tiny", "prompt": SYSTEM}).json()
    tokens = whole["count"] if "count" in whole else len(whole["tokens"])
    assert tokens - B <= record.tokens <= tokens + B


@pytest.mark.parametrize(
    ("more", "seconds"),
    [
        ({"cache_control": {"type": "ephemeral"}}, 300),
        ({"prompt_cache_retention": "24h"}, 86400),
        ({"prompt_cache_options": {"mode": "implicit"}}, 1800),
        ({"prompt_cache_options": {"ttl": "12h"}}, 43200),
    ],
)
def test_lifetimes_of_the_whole_prompt(served, more, seconds):
    server, http = served
    answer, receipt = chat(http, **more)
    assert answer.status_code == 200 and receipt["ignored_params"] == []
    until(server.engine.disk.records)
    (record,) = server.engine.disk.records()
    assert seconds - 60 < record.until - time.time() <= seconds
    assert record.tokens == receipt["usage"]["prompt_tokens"] // B * B


def test_openai_breakpoints_take_the_lifetime_of_the_request(served):
    server, http = served
    parts = marked(prompt_cache_breakpoint={"mode": "explicit"})
    answer, receipt = chat(http, parts=parts, prompt_cache_options={"mode": "explicit", "ttl": "30m"})
    assert receipt["usage"]["cache_write_ttl"].keys() == {"30m"}
    assert answer.headers["x-galley-ignored-params"] == "prompt_cache_options.mode"
    until(server.engine.disk.records)


def test_a_prompt_cache_key_writes_to_disk_while_others_run(served):
    """The key says the prompt comes back: its blocks are written without waiting for an idle engine."""
    server, http = served
    with http.stream(
        "POST",
        "/v1/completions",
        json={"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True},
    ) as busy:
        next(busy.iter_bytes())
        assert server.engine.disk.stats().saved == 0
        _, receipt = chat(http, prompt_cache_key="harbour")
        assert receipt["ignored_params"] == []
        assert server.engine.stats().running == 1 or server.engine.disk.stats().saved
        until(lambda: server.engine.disk.stats().saved >= receipt["usage"]["prompt_tokens"] // B)


def test_in_memory_retention_leaves_nothing_on_disk(served):
    server, http = served
    chat(http, prompt_cache_retention="in_memory")
    _, receipt = chat(http, prompt_cache_retention="in_memory")
    assert receipt["usage"]["cached_tokens"] > B
    time.sleep(0.2)
    assert server.engine.disk.stats().blocks == 0


def test_without_a_disk_tier_the_client_is_told(tiny_serve):
    server = tiny_serve()
    with httpx.Client(base_url=server.url, timeout=30) as http:
        answer, receipt = chat(http, parts=marked())
    assert "cache_control: no disk tier" in answer.headers["x-galley-clamped"]
    assert "no disk tier" in receipt["clamped"]["cache_control"]
    assert receipt["usage"]["cache_write_ttl"]["5m"] > B


def test_without_room_the_client_is_told(tiny_serve):
    server = tiny_serve(disk_bytes=8192)
    with httpx.Client(base_url=server.url, timeout=30) as http:
        answer, _ = chat(http, parts=marked())
        assert "no room" in answer.headers["x-galley-clamped"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"cache_control": {"type": "eternal"}}, "cache_control.type"),
        ({"cache_control": {}}, "cache_control.type"),
        ({"cache_control": "yes"}, "cache_control"),
        ({"cache_control": {"type": "ephemeral", "ttl": "2y"}}, "cache_control.ttl"),
        ({"prompt_cache_key": 7}, "prompt_cache_key"),
        ({"prompt_cache_retention": "forever"}, "prompt_cache_retention"),
        ({"prompt_cache_options": {"ttl": "1s"}}, "prompt_cache_options.ttl"),
        (
            {"prompt_cache_retention": "in_memory", "cache_control": {"type": "ephemeral"}},
            "prompt_cache_retention",
        ),
        ({"parts": marked("2y")}, "messages[0].content[0].cache_control.ttl"),
        (
            {"parts": marked(prompt_cache_breakpoint={"mode": "implicit"})},
            "messages[0].content[0].prompt_cache_breakpoint.mode",
        ),
    ],
)
def test_malformed_fields_are_named(tiny_server, more, param):
    with httpx.Client(base_url=tiny_server.url, timeout=30) as http:
        answer, _ = chat(http, **more)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_more_than_four_breakpoints_keep_the_last_four_and_say_so(served):
    server, http = served
    parts = [
        {"type": "text", "text": f"Rule {n}. " * 7, "cache_control": {"type": "ephemeral"}} for n in range(6)
    ]
    answer, receipt = chat(http, parts=parts)
    assert "the last 4 of 6" in answer.headers["x-galley-clamped"]
    until(lambda: len(server.engine.disk.records()) == 4)
    assert receipt["clamped"]["cache_control"]


def test_kv13_hit_rate_by_tenant_and_disk_figures_are_metrics(served):
    server, http = served
    for _ in range(2):
        chat(http)
    until(lambda: server.engine.disk.stats().saved)
    lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
    asked = float(lines['galley:cache_query_tokens_total{tenant="local"}'])
    hits = float(lines['galley:cache_hit_tokens_total{tenant="local"}'])
    assert 0 < hits < asked
    disk = {name.partition("{")[0]: float(value) for name, value in lines.items() if "kv_disk" in name}
    assert disk["galley:kv_disk_limit_bytes"] == 16 << 20
    assert disk["galley:kv_disk_bytes"] > 0
    assert disk["galley:kv_disk_saved_blocks_total"] > 0
    assert disk["galley:kv_disk_damaged_blocks_total"] == 0


# ---- the command line


@pytest.fixture
def command(tmp_path, tiny_path, monkeypatch):
    monkeypatch.setenv("GALLEY_HOME", str(tmp_path / "home"))

    def run(*arguments, code=0):
        from galley.cli.main import invoke

        runner = CliRunner()
        with runner.isolation() as streams:
            found = invoke([*map(str, arguments)])
            out = streams[0].getvalue().decode()
        assert found == code, out
        return out

    assert galley is not None
    return run


def test_pins_from_the_command_line(command, tiny_path, tmp_path):
    assert json.loads(command("cache", "list", "--json"))["pins"] == []
    system = tmp_path / "system.txt"
    system.write_text(SYSTEM)
    small = ("--kv-memory", "4MiB", "--threads", "1")
    pin = json.loads(command("cache", "pin", "harbour", tiny_path, "--file", system, "--json", *small))
    assert pin["name"] == "harbour" and pin["tokens"] >= B and pin["until"] is None
    command("cache", "pin", "raw", tiny_path, "--raw", "--system", SYSTEM, "--salt", "s", *small)
    listed = json.loads(command("cache", "list", "--json"))
    assert [each["name"] for each in listed["pins"]] == ["harbour", "raw"]
    assert listed["pins"][1]["salted"]
    assert listed["bytes"] == listed["models"][0]["bytes"] >= listed["kept_bytes"] > 0
    assert listed["models"][0]["identity"]["kv_dtype"] in ("f16", "f32")
    assert "harbour" in command("cache", "list")
    assert json.loads(command("cache", "drop", "raw", "--json"))[0]["name"] == "raw"
    command("cache", "drop", "raw", code=2)
    command("cache", "drop", "harbour")
    assert json.loads(command("cache", "list", "--json"))["pins"] == []
    command("cache", "drop", "--all")
    assert json.loads(command("cache", "list", "--json"))["bytes"] == 0


def test_pins_that_cannot_be(command, tiny_path):
    small = ("--kv-memory", "4MiB", "--threads", "1")
    command("cache", "pin", "short", tiny_path, "--raw", "--system", "hi", *small, code=2)
    command("cache", "pin", "a/b", tiny_path, "--system", SYSTEM, *small, code=2)
    command("cache", "pin", "big", tiny_path, "--system", SYSTEM, "--disk-bytes", "16KiB", *small, code=1)
    command("cache", "pin", "off", tiny_path, "--system", SYSTEM, "--disk-bytes", "0", *small, code=2)
    command("cache", "pin", "both", tiny_path, code=2)
    command("cache", "drop", code=2)
    command("cache", "drop", "nothing", code=2)
    assert json.loads(command("cache", "list", "--json"))["pins"] == []


# ---- the library


def test_the_library_writes_nothing_unless_asked(tiny_path, tmp_path):
    from galley import LLM

    home = tmp_path / "home"
    options = {"home": home, "kv_memory": 4 << 20, "threads": 1}
    with LLM(str(tiny_path), **options) as llm:
        llm.generate(SYSTEM, SamplingParams(max_tokens=2, temperature=0))
    assert not (home / "kv").exists()
    with LLM(str(tiny_path), kv_disk=1 << 20, **options) as llm:
        llm.generate(SYSTEM, SamplingParams(max_tokens=2, temperature=0))
    assert list((home / "kv").glob("*/*.kv"))


@pytest.mark.model
def test_a_prefix_seen_before_a_restart_is_found_after_it(smollm2_home):
    from galley import LLM

    params = SamplingParams(max_tokens=8, temperature=0)
    said = []
    for _ in range(2):
        with LLM("smollm2-135m", home=smollm2_home, kv_disk=64 << 20, kv_memory=32 << 20) as llm:
            (result,) = llm.generate(SYSTEM * 2, params)
        said.append((result.outputs[0].token_ids, result.usage.cached_tokens, result.usage.prompt_tokens))
    assert said[0][0] == said[1][0]
    assert said[0][1] == 0
    assert said[1][1] == (said[1][2] - 1) // B * B
