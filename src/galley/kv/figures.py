"""The disk tier in numbers."""

import msgspec

__all__ = ["DiskStats"]


class DiskStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot; totals since this process opened the store.

    Attributes:
        bytes, blocks: on disk now, of all models. kept_bytes: of them pinned or held.
        damaged: files that failed verification and were removed. refused: blocks and holds for which there
            was no room beside what is kept. failures: writes that the disk refused. fault: the last of them
            in words, None once a later one went through.
    """

    limit: int
    bytes: int
    blocks: int
    kept_bytes: int
    saved: int
    loaded: int
    evicted: int
    damaged: int
    refused: int
    failures: int
    fault: str | None
