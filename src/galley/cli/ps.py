"""`galley ps`: what a running server has in memory."""

import json
import urllib.error
import urllib.request
from typing import Any

import click

from galley.cli.session import Session
from galley.cli.terminal import print_json, print_table, size
from galley.errors import AuthenticationError, GalleyError


@click.command()
@click.option("--url", metavar="URL", help="The server; default: the host and port of the settings.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
@click.pass_obj
def ps(session: Session, url: str | None, as_json: bool) -> None:
    """Show which models a running server has in memory."""
    server = session.config.server
    host = f"[{server.host}]" if ":" in server.host else server.host
    models = ask(url or f"http://{host}:{server.port}", server.api_key)
    if as_json:
        print_json(models)
        return
    print_table(
        ("NAME", "STATE", "MEMORY", "CONTEXT", "RUNNING", "WAITING", "UNTIL"),
        [
            (
                one["id"],
                one["state"] + (f" (level {one['level']})" if one["state"] == "asleep" else ""),
                size(one["bytes"]) if one["bytes"] else "-",
                str(one["context"]),
                str(one["running"]),
                str(one["waiting"]),
                until(one),
            )
            for one in models
        ],
    )


def until(one: dict[str, Any]) -> str:
    """When it falls asleep."""
    if one["pinned"]:
        return "pinned"
    left = one["sleeps_in_s"]
    return "-" if left is None else f"{left:.0f} s"


def ask(url: str, key: str | None) -> list[dict[str, Any]]:
    """The server's own list. Raises GalleyError when there is no server to ask."""
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/x/status")
    if key:
        request.add_header("authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: list[dict[str, Any]] = json.loads(answer.read())["data"]
            return found
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise AuthenticationError(f"{url} asks for a key.", hint="Set GALLEY_API_KEY.") from error
        raise GalleyError(f"{url} answered with status {error.code}.") from error
    except (OSError, ValueError, KeyError) as error:
        raise GalleyError(
            f"No Galley server answers at {url}: {error}", hint="galley serve; or give --url"
        ) from error
