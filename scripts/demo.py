"""Serve a model on a free port, stream an answer through the official OpenAI client, show its receipt."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai

PROMPT = "What is gravity?"
GALLEY = str(Path(sys.executable).with_name("galley"))


def main(model: str) -> int:
    """Returns 0 when an answer was streamed, its receipt was found, and the server stopped well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    print(f"$ galley serve --model {model} --port {port}", flush=True)
    # Settings of the surrounding shell must not turn the demonstration into something else.
    env = {
        name: value for name, value in os.environ.items() if name not in {"GALLEY_API_KEY", "GALLEY_MODEL"}
    }
    server = subprocess.Popen(
        [GALLEY, "serve", "--model", model, "--host", "127.0.0.1", "--port", str(port)], env=env
    )
    try:
        wait_until_ready(server, url)
        receipt = ask(url, model)
        print(f"\n\n$ galley receipt {receipt}", flush=True)
        subprocess.run([GALLEY, "receipt", receipt], check=True)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
    print(f"\nThe server stopped with exit code {code}.")
    return code


def wait_until_ready(server: "subprocess.Popen[bytes]", url: str, seconds: float = 120) -> None:
    """Raises RuntimeError when the server ends or is not ready in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # Not listening yet.
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready within {seconds:.0f} s")


def ask(url: str, model: str) -> str:
    """Stream an answer to stdout; returns the id of its receipt."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none-needed-on-loopback")
    print(f"\n> {PROMPT}", flush=True)
    answer = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=96,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    words = 0
    for chunk in answer.parse():
        for choice in chunk.choices:
            words += len(choice.delta.content or "")
            print(choice.delta.content or "", end="", flush=True)
    if not words:
        raise RuntimeError("the answer was empty")
    receipt = answer.headers["x-galley-receipt"]
    # The receipt is written when the request is over, a moment after its last byte.
    for _ in range(200):
        if httpx.get(f"{url}/v1/receipts/{receipt}").status_code == 200:
            return str(receipt)
        time.sleep(0.02)
    raise RuntimeError(f"there is no receipt {receipt}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"))
