"""A witness: cosigns a log's checkpoints once it has seen that each continues the one before (C2SP
tlog-cosignature). Whoever keeps one elsewhere cannot be shown two histories."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from galley.audit.merkle import consistency_path
from galley.audit.note import COSIGNED, Checkpoint, Signer, Verifier, parse_checkpoint
from galley.audit.tiles import AuditDamaged, Tiles, Tree
from galley.audit.verifier import Wrong, check_consistency

__all__ = ["Witness"]


class Witness:
    """Key and memory of one witness of one log, in a folder of its own: best on another machine.

    Args:
        folder: holds ``key`` (made when missing) and ``seen``, the last checkpoint cosigned.
        vkey: of the log.
    """

    def __init__(
        self, folder: Path, vkey: str, *, name: str | None = None, now: Callable[[], float] = time.time
    ) -> None:
        self.folder = folder
        self._log = Verifier(vkey)
        self._now = now
        self.signer = Signer.kept(folder / "key", name=name or "galley-witness", kind=COSIGNED)

    @property
    def seen(self) -> Checkpoint | None:
        """The last checkpoint cosigned, with the cosignature."""
        path = self.folder / "seen"
        return parse_checkpoint(path.read_text(encoding="utf-8")) if path.exists() else None

    def cosign(self, log: Path) -> Checkpoint:
        """Look at the log in a folder and cosign its checkpoint. Remembered before it is given out.

        Raises BadNote (not signed by the log's key), AuditDamaged (it does not continue what was cosigned
        before, or its tiles do not make its root), OSError.
        """
        given = parse_checkpoint((log / "checkpoint").read_text(encoding="utf-8"))
        self._log.check(given)
        if given.origin != self._log.name:
            raise AuditDamaged(f"the checkpoint is of {given.origin}, not of {self._log.name}")
        before = self.seen
        if before is not None:
            if given.size < before.size:
                raise AuditDamaged(f"the log had {before.size} entries and has {given.size}")
            path = consistency_path(Tree(Tiles(log), given.size), before.size, given.size)
            try:
                check_consistency(before.size, before.root, given.size, given.root, path)
            except Wrong as wrong:
                raise AuditDamaged(str(wrong)) from wrong
        made = self.signer.sign(given, seconds=int(self._now()))
        beside = self.folder / "seen.new"
        with beside.open("w", encoding="utf-8") as file:
            file.write(made.note)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(self.folder / "seen")
        return made
