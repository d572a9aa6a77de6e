# ruff: noqa: E501
"""Damaged input for as long as one likes: no crash, no hang, and never a 5xx for bad input.

    python -m tests.fuzz http --seconds 1800    bodies and heads, at a whole server on a socket
    python -m tests.fuzz gguf --seconds 1800    model files, through reader, family, tokenizer and template
    python -m tests.fuzz disk --seconds 1800    folders of the prefix cache, under the store and under an engine

``--seed`` repeats a run. Exit code 1 with the offending input in ``fuzz-*.bin`` when something falls over.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from galley.endpoint.params import CHANGES_ANSWER
from galley.errors import GalleyError
from galley.model.model import Model
from tests.e2e.conftest import TinyServer
from tests.fuzz_disk import disk
from tests.property import test_gguf_fuzz as headers
from tests.tiny import tiny_gguf

HANG_S = 30.0
DOORS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/apply-template")
PAGES = (
    "/v1/models",
    "/v1/models/x",
    "/v1/receipts",
    "/v1/receipts/x",
    "/health",
    "/ready",
    "/metrics",
    "/nowhere",
)
NAMES = (
    "model", "messages", "prompt", "stream", "stream_options", "n", "stop", "logit_bias", "logprobs", "echo",
    "top_logprobs", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "max_completion_tokens",
    "min_tokens", "metadata", "user", "store", "service_tier", "response_format", "modalities", "tool_choice",
    "chat_template_kwargs", "stop_token_ids", "priority", "cache_salt", "max_queue_s", "max_total_s",
    "repetition_penalty", "frequency_penalty", "presence_penalty", "ignore_eos", "return_token_ids", "tokens",
    "add_generation_prompt", "add_special_tokens", "skip_special_tokens", "include_stop_str_in_output",
    *CHANGES_ANSWER,
)  # fmt: skip
WORDS = ("tiny", "user", "system", "assistant", "text", "hello", "", "\x00", "é", "🙂", "<|im_end|>", "1", "auto",
         "default", "flex", "priority", "json_object", "\ud800", "a" * 3000)  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    2,
    5,
    16,
    20,
    500,
    2**31,
    -(2**31),
    2**63,
    2**64,
    2**70,
    0.5,
    -0.5,
    1e-9,
    1e300,
    1e400,
    299,
    300,
)


def value(dice: random.Random, depth: int = 0) -> Any:
    """Any JSON value, often of the right sort."""
    kind = dice.randrange(7 if depth < 4 else 4)
    if kind == 0:
        return dice.choice((None, True, False))
    if kind in (1, 2):
        return dice.choice(NUMBERS)
    if kind == 3:
        return dice.choice(WORDS)
    if kind == 4:
        return [value(dice, depth + 1) for _ in range(dice.randrange(5))]
    if kind == 5:
        return {"role": dice.choice(("user", "system", "tool", 3)), "content": value(dice, depth + 1)}
    return {dice.choice((*WORDS, *NAMES)): value(dice, depth + 1) for _ in range(dice.randrange(4))}


def body(dice: random.Random, model: str) -> bytes:
    """A body: mostly a good one with a few fields changed, sometimes damaged as bytes."""
    good = {"model": model, "messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "tokens": [5, 6]}
    fields: dict[str, Any] = {"max_tokens": dice.randrange(1, 6)} | (good if dice.random() < 0.8 else {})
    for _ in range(dice.randrange(4)):
        fields[dice.choice(NAMES)] = value(dice)
    raw = json.dumps(fields).encode()
    if dice.random() < 0.1:
        raw = (b"[" * dice.randrange(20_000)) + raw
    for _ in range(dice.choice((0, 0, 0, 1, 3))):
        at = dice.randrange(len(raw) + 1)
        raw = raw[:at] + dice.randbytes(dice.randrange(4)) + raw[at + dice.randrange(4) :]
    return raw


def exchange(dice: random.Random, model: str) -> bytes:
    """A whole HTTP request, its head now and then damaged as well."""
    if dice.random() < 0.1:
        tail = dice.choice(("", "?limit=5", "?limit=x", "?since=nan", "?before=1e999", "?model=%ff", "?x=1"))
        return f"GET {dice.choice(PAGES)}{tail} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode()
    raw = body(dice, model)
    head = f"POST {dice.choice(DOORS)} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(raw)}\r\n"
    if dice.random() < 0.2:
        name = dice.choice(
            ("x-galley-tenant", "authorization", "content-type", "expect", "transfer-encoding")
        )
        head += f"{name}: {dice.choice(('x', '', 'a' * 200, 'chunked', '100-continue', 'é'))}\r\n"
    whole = head.encode("latin-1") + b"connection: close\r\n\r\n" + raw
    if dice.random() < 0.05:
        at = dice.randrange(len(head))
        whole = whole[:at] + dice.randbytes(3) + whole[at + 3 :]
    return whole


async def ask(port: int, sent: bytes) -> bytes:
    """What comes back before the connection closes. Only when nothing does is the sending end closed too: a
    server that still waits for the rest of a body must notice, one that is answering may take it as leaving."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        reading = asyncio.ensure_future(reader.read(1 << 22))
        await asyncio.wait([reading], timeout=1.0)
        if not reading.done():
            writer.write_eof()
        return await reading
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def all_of(port: int, batch: list[bytes]) -> list[bytes] | None:
    """The answers to all; None when one does not come. Time is counted in short sleeps, so that a machine on
    which others keep this process from running does not look like a hang."""
    asking = asyncio.gather(*(ask(port, sent) for sent in batch))
    for _ in range(round(HANG_S / 0.1)):
        if (await asyncio.wait([asking], timeout=0.1))[0]:
            return asking.result()
    asking.cancel()
    return None


def verdict(answer: bytes) -> str | None:
    """What is wrong with an answer, or None. No answer at all is fine for a head that is not HTTP."""
    if not answer:
        return None
    status = answer[9:12]
    if status == b"503":
        return (
            None if b'"overloaded"' in answer or b"deadline_exceeded" in answer else "503 without its reason"
        )
    if status == b"504":
        return None if b"deadline_exceeded" in answer else "504 without its reason"
    if status >= b"500":
        return f"status {status.decode('latin-1')}"
    if b'"server_error"' in answer and b"deadline_exceeded" not in answer:
        return "a server error inside the answer"
    return None


def http(seconds: float, dice: random.Random) -> tuple[int, str | None, bytes]:
    """Bodies and heads at a server; returns how many, what is wrong, and with which input."""
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_gguf(Path(folder) / "tiny.gguf", "llama", seed=7)
        server = TinyServer(Path(folder), path, max_jobs=8, max_wait_s=0).start()
        seen: Counter[str] = Counter()
        count, end = 0, time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                batch = [exchange(dice, server.model) for _ in range(16)]

                answers = asyncio.run(all_of(server.port, batch))
                if answers is None:
                    return count, "no answer in time to one of sixteen", b"\n---\n".join(batch)
                for sent, answer in zip(batch, answers, strict=True):
                    count += 1
                    seen[answer[9:12].decode("latin-1") or "closed"] += 1
                    fault = verdict(answer)
                    if fault:
                        return count, f"{fault}: {answer[:2000]!r}", sent
                server.idle(HANG_S)
                stats = server.engine.stats()
                if stats.blocks_used or stats.violations or stats.faults or server.engine.scheduler.check():
                    return count, f"the engine is not well: {stats}", b"\n---\n".join(batch)
            print(f"answers: {dict(seen)}")
        finally:
            server.stop()
    return count, None, b""


def gguf(seconds: float, dice: random.Random) -> tuple[int, str | None, bytes]:
    """Model files: damaged headers through the reader, damaged small models through everything that opens one."""
    seed, places = headers.header()
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        whole = tiny_gguf(Path(folder) / "good.gguf", "llama", layers=1, seed=7).read_bytes()
        bad = Path(folder) / "bad.gguf"
        with_text = whole.index(b"token_embd.weight")
        count, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            count += 1
            began = time.monotonic()
            small = dice.random() < 0.9
            blob = headers.mutate(dice, seed, places) if small else damaged(dice, whole, with_text)
            try:
                if small:
                    file = headers.GGUF(blob, "fuzz")
                    for name, info in file.tensors.items():
                        assert file.raw(name).size == info.nbytes
                else:
                    bad.write_bytes(blob)
                    Model.open(bad, "bad").close()
                seen["read"] += 1
            except GalleyError as error:
                seen[type(error).__name__] += 1
            except Exception as error:  # anything but a typed error is what is looked for
                return count, f"{type(error).__name__}: {error}", blob
            if time.monotonic() - began > HANG_S:
                return count, "it took too long", blob
    print(f"files: {dict(seen)}")
    return count, None, b""


def damaged(dice: random.Random, whole: bytes, end: int) -> bytes:
    """A small model with damage in its metadata."""
    blob = bytearray(whole)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at = dice.randrange(end + 2000)
        blob[at] = dice.choice((0, 1, 0xFF, dice.randrange(256)))
    if dice.random() < 0.1:
        del blob[dice.randrange(len(blob)) :]
    return bytes(blob)


TARGETS: dict[str, Callable[[float, random.Random], tuple[int, str | None, bytes]]] = {
    "http": http,
    "gguf": gguf,
    "disk": disk,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else time.time_ns() % 2**32
    count, fault, culprit = TARGETS[given.target](given.seconds, random.Random(seed))
    print(
        f"{given.target}: {count} inputs in {given.seconds:.0f} s, seed {seed}: {fault or 'nothing fell over'}"
    )
    if fault:
        path = Path(f"fuzz-{given.target}-{seed}.bin")
        path.write_bytes(culprit)
        print(f"the input is in {path}")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
