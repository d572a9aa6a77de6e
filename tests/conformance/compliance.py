"""The suites of `llm-comply`, unmodified, against a served model: chat, open responses, messages.

    python -m tests.conformance.compliance COMMAND [MODEL]

COMMAND is `llm-comply` in an environment of its own; ``make comply`` makes it. The exit code is 0 when
nothing failed but what EXPECTED lists, and nothing that it lists passed. A small model that draws at random
may talk until its `max_tokens`, which some tests take for a fault: such a test is asked again, up to twice,
and the line says so.
"""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

EXPECTED = {
    "openai-chat": {"Image Input": "models here read text; a picture is a 400 that names its part"},
    "open-responses": {"Image Input": "models here read text; a picture is a 400 that names its part"},
    "anthropic": {"Image Input": "models here read text; a picture is a 400 that names its block"},
}
"""Tests that must fail, by suite, and why. docs/API.md has the same list."""


def wait(url: str, within_s: float = 120.0) -> None:
    """Until the server answers that it is ready."""
    end = time.monotonic() + within_s
    while True:
        try:
            with urllib.request.urlopen(f"{url}/ready"):
                return
        except (OSError, urllib.error.HTTPError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def suite(command: str, form: str, url: str, model: str, only: str = "") -> list[dict[str, Any]]:
    """What one suite says of each of its tests, or of one."""
    way = ["-u", f"{url}/v1", "-k", "sk-x", "-m", model, "--timeout", "300", "--json"]
    done = subprocess.run(
        [command, "--format", form, *way, *(["-f", only] if only else [])],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return list(json.loads(done.stdout)["results"])
    except (ValueError, KeyError):
        raise SystemExit(
            f"{form}: {command} said no JSON\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        ) from None


def main(command: str, model: str = "smollm2-135m", port: int = 7199) -> int:
    url = f"http://127.0.0.1:{port}"
    call = "from galley.cli.start import main; main()"
    served = subprocess.Popen(
        [sys.executable, "-c", call, "serve", "--model", model, "--port", str(port)],
        stderr=subprocess.DEVNULL,
    )
    wrong = 0
    try:
        wait(url)
        for form, expected in EXPECTED.items():
            for first in suite(command, form, url, model):
                test = first
                name, told, tries = test["name"], expected.get(test["name"]), 1
                while test["status"] == "failed" and told is None and tries < 3:
                    (test,) = suite(command, form, url, model, test["id"])
                    tries += 1
                good = (test["status"] == "failed") == (told is not None) or test["status"] == "skipped"
                wrong += not good
                note = f"  ({told})" if told else f"  (try {tries})" if tries > 1 else ""
                note += "" if good else "  " + "; ".join(map(str, test.get("errors", ())))[:600]
                print(f"{'ok  ' if good else 'FAIL'} {form}: {name}: {test['status']}{note}", flush=True)
    finally:
        served.terminate()
        served.wait(60)
    print("all as it should be" if not wrong else f"{wrong} not as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
