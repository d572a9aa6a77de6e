"""A whole server that may reach only loopback: what it serves, what it refuses, whom it tried to reach.

    python -m tests.faults.offline HOME local-only

An audit hook (PEP 578) sees every connect and every look-up of a name in the process, whoever makes it; those
that leave the machine are noted and refused. The cloud's address is of TEST-NET-1 (RFC 5737). Prints JSON.
"""

import ipaddress
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

LEFT = []
"""Connects and look-ups that would have left the machine."""
CATALOG = """
[policy]
location = "{location}"
retries = 0
deadline_s = 10
hedge_share = 0.0
[[model]]
id = "tiny"
capabilities = ["chat", "completion", "logprobs", "n", "sampling", "token_ids"]
fallback = ["big"]
[[model]]
id = "big"
capabilities = ["chat", "completion", "tools"]
fallback = ["tiny"]
[[model]]
id = "far"
[[model]]
id = "named"
[[provider]]
name = "cloud"
kind = "openai"
url = "http://192.0.2.1:80/v1"
connect_s = 1.0
[[provider.offer]]
model = "big"
price = [{{ input = "1", output = "2" }}]
[[provider.offer]]
model = "far"
price = [{{ input = "1", output = "2" }}]
[[provider]]
name = "other"
kind = "anthropic"
url = "http://api.invalid/v1"
connect_s = 1.0
[[provider.offer]]
model = "named"
price = [{{ input = "1", output = "2" }}]
[[route]]
name = "auto"
policy = "specialised"
models = ["big", "tiny", "far"]
[[route]]
name = "away"
policy = "fixed"
models = ["far", "named"]
"""


def watch(event, args):
    """The hook: OSError for whatever is not loopback."""
    if event == "socket.connect":
        address = args[1]
        if isinstance(address, str | bytes):  # a Unix socket
            return
        host = address[0]
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if host in (None, "", "localhost", b"localhost"):
        return
    try:
        if ipaddress.ip_address(host if isinstance(host, str) else host.decode()).is_loopback:
            return
    except ValueError:
        pass
    LEFT.append([event, str(host)])
    raise OSError(f"blocked: {event} {host}")


def post(url, path, **body):
    """(status, body)."""
    asked = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def main():
    from tests.e2e.conftest import TinyServer
    from tests.tiny import tiny_gguf

    home, location = Path(sys.argv[1]), sys.argv[2]
    sys.addaudithook(watch)
    catalog = home / "catalog.toml"
    catalog.write_text(CATALOG.format(location=location))
    server = TinyServer(
        home, tiny_gguf(home / "tiny.gguf", "llama", seed=7), **{"router.catalog": str(catalog)}
    )
    assert server.model == "tiny", server.model
    server.start()
    turn = [{"role": "user", "content": "hi"}]
    found = {}
    try:
        chat, text = "/v1/chat/completions", "/v1/completions"
        asked = {
            "chat": (chat, {"model": "tiny", "messages": turn, "max_tokens": 3}),
            "stream": (chat, {"model": "tiny", "messages": turn, "max_tokens": 3, "stream": True}),
            "text": (text, {"model": "tiny", "prompt": "a", "max_tokens": 3}),
            "ids": (text, {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 3}),
            "logprobs": (chat, {"model": "tiny", "messages": turn, "max_tokens": 3, "logprobs": True}),
            "fallback": (chat, {"model": "big", "messages": turn, "max_tokens": 3}),
            "route": (chat, {"model": "auto", "messages": turn, "max_tokens": 3}),
            "messages": ("/v1/messages", {"model": "tiny", "messages": turn, "max_tokens": 3}),
            "far": (chat, {"model": "far", "messages": turn}),
            "named": (chat, {"model": "named", "messages": turn}),
            "away": (chat, {"model": "away", "messages": turn, "stream": True}),
            "tools": (
                chat,
                {
                    "model": "auto",
                    "messages": turn,
                    "tools": [{"type": "function", "function": {"name": "f"}}],
                },
            ),
        }
        for name, (path, body) in asked.items():
            status, raw = post(server.url, path, **body)
            found[name] = {"status": status, "body": raw[-2000:]}
    finally:
        server.stop()
    print(json.dumps({"answers": found, "left": LEFT}))


if __name__ == "__main__":
    main()
