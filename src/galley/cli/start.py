"""Where the command begins: `--version` is answered before anything is imported for the rest."""

import sys

from galley import __version__


def main() -> None:
    """Entry point of ``galley``."""
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"galley {__version__}\n")
        return
    from galley.cli.main import main as run

    run()
