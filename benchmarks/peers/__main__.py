"""``python -m benchmarks.peers [NAME…]``: install the peers."""

import json
import subprocess
from pathlib import Path

import click

from benchmarks.peers import PEERS, LlamaCpp, Peer


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(PEERS)))
@click.option(
    "--llamacpp-source", type=click.Path(exists=True, path_type=Path), help="An unpacked llama.cpp."
)
@click.option(
    "--llamacpp-build", type=click.Path(exists=True, path_type=Path), help="Its finished native build."
)
def main(names: tuple[str, ...], llamacpp_source: Path | None, llamacpp_build: Path | None) -> None:
    """Install the peers NAME (all of them by default) into .bench/.

    llama.cpp is 77 MB of source that compiles for some minutes; the others are Python packages in
    environments of their own, some hundred MB each. The sizes are told before each download.
    """
    if (llamacpp_source is None) != (llamacpp_build is None):
        raise click.UsageError("--llamacpp-source and --llamacpp-build belong together")
    failed = []
    for name in names or PEERS:
        peer: Peer = PEERS[name]()
        if name == "llamacpp":
            peer = LlamaCpp(source=llamacpp_source, build=llamacpp_build)
        try:
            peer.install()
            click.echo(f"{name}: {json.dumps(peer.describe())}")
        except (OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
            click.echo(f"{name}: NOT INSTALLED: {error}", err=True)
            failed.append(name)
    if failed:
        raise click.ClickException(f"not installed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
