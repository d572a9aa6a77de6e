"""`galley cache`: prefixes kept on disk. Pin, list, drop."""

import asyncio
import contextlib
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from galley.cli.session import ENGINE_FLAGS, Session, settings_options
from galley.cli.terminal import print_json, print_table, size
from galley.errors import CacheFull, ConfigError, InvalidRequest, NotFound

if TYPE_CHECKING:
    from galley.cli.house import House
    from galley.kv.disk import DiskStore
    from galley.kv.pins import Record

HOLD_S = 300
"""The prefix is held so long while it is written, until it is pinned."""
WRITTEN_S = 60.0
"""How long the writing may take."""


@click.group()
def cache() -> None:
    """Pin, list and drop prompt prefixes kept on disk.

    A pinned prefix stays through eviction and restarts, so its first token comes without computing it again.
    """


@cache.command()
@click.argument("name", metavar="NAME")
@click.argument("model", metavar="MODEL")
@click.option("--system", metavar="TEXT", help="Pin the conversation's start with this system message.")
@click.option(
    "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read it from here."
)
@click.option("--raw", is_flag=True, help="The text as it is, for /v1/completions: no chat template.")
@click.option("--tenant", default="local", metavar="NAME", help="Whose prefix it is. Default: local.")
@click.option("--salt", metavar="TEXT", help="The cache_salt its requests send.")
@click.option("--json", "as_json", is_flag=True, help="The pin as JSON on stdout.")
@settings_options(ENGINE_FLAGS)
@click.pass_obj
def pin(
    session: Session,
    /,
    *,
    name: str,
    model: str,
    system: str | None,
    file: Path | None,
    raw: bool,
    tenant: str,
    salt: str | None,
    as_json: bool,
) -> None:
    """Compute a prefix once and keep it on disk until it is dropped.

    NAME replaces a pin of the same name. Whole blocks of 16 tokens are kept.
    """
    from galley.kv.pins import check_name

    if (system is None) == (file is None):
        raise click.UsageError("Give the text with --system or with --file.")
    text = file.read_text(encoding="utf-8") if file is not None else system or ""
    check_name(name)
    if session.config.kv.disk_bytes == 0:
        raise ConfigError("There is no disk tier: kv.disk_bytes is 0.", param="kv.disk_bytes")
    session.store.resolve(model)  # Before the heavy imports: a missing model is told at once.
    from galley.cli.house import House

    with House(session.config, model) as house:
        record = asyncio.run(_pin(house, name, text, raw=raw, tenant=tenant, salt=salt))
    if as_json:
        print_json(record)
    else:
        click.echo(f"{record.name}: {record.tokens} tokens, {size(record.bytes)} on disk")


async def _pin(house: "House", name: str, text: str, *, raw: bool, tenant: str, salt: str | None) -> "Record":
    from galley.kv import chain
    from galley.types import SamplingParams

    disk, backend = house.engine.disk, house.engine.backend
    if disk is None:
        raise ConfigError("The disk tier could not be opened; see the warning.", param="kv.disk_path")
    params = SamplingParams(max_tokens=1, temperature=0)
    ids = await house.prefix(text, raw=raw)
    blocks = len(ids) // backend.block_size
    if not blocks:
        raise InvalidRequest(
            f"The prefix has {len(ids)} tokens; at least {backend.block_size} make a block.", param="prompt"
        )
    if not disk.room(blocks, backend.block_bytes):
        raise disk.full(blocks * backend.block_bytes)
    kept = ids[: blocks * backend.block_size]
    asked: dict[str, Any] = {"prompts": [kept], "tenant": tenant, "cache_salt": salt, "cache_ttl_s": HOLD_S}
    async with house.open(params, api="cli.cache", **asked) as answer:
        async for _ in answer.deltas():
            pass
    space = house.engine.scheduler.namespace(tenant, salt, None)
    *_, leaf = chain.digests(space, kept, backend.block_size)
    until = time.monotonic() + WRITTEN_S
    while not disk.has(leaf):
        if disk.stats().refused or disk.fault or time.monotonic() > until:
            raise CacheFull(
                f"The prefix could not be written: {disk.fault or 'there is no room'}.", param="kv.disk_bytes"
            )
        await asyncio.sleep(0.01)
    return disk.pin(
        name, leaf, tokens=len(kept), model=house.model.name, tenant=tenant, salted=salt is not None
    )


@cache.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def list_cache(session: Session, as_json: bool) -> None:
    """List pins and holds, and what the cache takes on disk."""
    settings = session.config.kv
    with _readable(settings.disk_path):
        store = _look(settings.disk_path)
    stats = None if store is None else store.stats()
    records = [] if store is None else store.records()
    if as_json:
        print_json(
            {
                "path": str(settings.disk_path),
                "limit": settings.disk_bytes,
                "bytes": stats.bytes if stats else 0,
                "blocks": stats.blocks if stats else 0,
                "kept_bytes": stats.kept_bytes if stats else 0,
                "models": [] if store is None else _models(store),
                "pins": [record for record in records if record.until is None],
                "holds": [record for record in records if record.until is not None],
            }
        )
        return
    if records:
        print_table(
            ("NAME", "MODEL", "TENANT", "TOKENS", "SIZE", "UNTIL"),
            [
                (
                    record.name if record.until is None else f"(held) {record.leaf[:12]}",
                    record.model[:24] or "-",
                    (record.tenant or "-") + (" +salt" if record.salted else ""),
                    str(record.tokens),
                    size(record.bytes),
                    "dropped" if record.until is None else _clock(record.until),
                )
                for record in records
            ],
        )
    used = stats.bytes if stats else 0
    click.echo(f"{size(used)} of {size(settings.disk_bytes)} in {settings.disk_path}", err=True)


@cache.command()
@click.argument("names", metavar="NAME...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every pin, hold and block of every model.")
@click.option("--json", "as_json", is_flag=True, help="What was dropped as JSON on stdout.")
@click.pass_obj
def drop(session: Session, names: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Drop pins and the blocks that nothing else needs; or empty the cache."""
    if bool(names) == everything:
        raise click.UsageError("Name pins, or give --all.")
    with _readable(session.config.kv.disk_path):
        store = _look(session.config.kv.disk_path)
        freed = store.clear() if store is not None and everything else 0
    if everything:
        if as_json:
            print_json({"freed_bytes": freed})
        else:
            click.echo(f"{size(freed)} freed")
        return
    known = {} if store is None else {record.name: record for record in store.records()}
    for name in names:
        if name not in known or known[name].until is not None:
            raise NotFound(f"There is no pin {name[:80]!r}.", param="name", hint="galley cache list")
    with _readable(session.config.kv.disk_path):
        dropped = [store.drop(name) for name in dict.fromkeys(names)] if store is not None else []
    if as_json:
        print_json(dropped)
        return
    for record in dropped:
        if record is not None:
            click.echo(f"{record.name} dropped")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the system refuses, as a typed error that says what to do."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"The prefix cache {path} is not to be had: {error.strerror or error}.",
            param="kv.disk_path",
            hint="it may be another user's: set GALLEY_HOME (--home), or kv.disk_path",
        ) from error


def _look(path: Path) -> "DiskStore | None":
    """The store, to look after it: of no model, without a limit that would evict. None before first use."""
    from galley.kv.disk import DiskStore

    return DiskStore(path, 1 << 62) if _there(path) else None


def _there(path: Path) -> bool:
    """Whether there is such a folder. Raises OSError where that cannot be told."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _models(store: "DiskStore") -> list[dict[str, object]]:
    """For each identity on disk: its folder, blocks and bytes, and what it is made of."""
    import json

    counts: dict[str, tuple[int, int]] = {}
    for entry in store.entries():
        blocks, total = counts.get(entry.folder, (0, 0))
        counts[entry.folder] = (blocks + 1, total + entry.size)
    found: list[dict[str, object]] = []
    for folder, (blocks, total) in sorted(counts.items()):
        try:
            identity = json.loads((store.path / folder / "identity.json").read_bytes())
        except (OSError, ValueError):
            identity = None  # the label is for people; the blocks themselves say whose they are
        found.append({"folder": folder, "blocks": blocks, "bytes": total, "identity": identity})
    return found


def _clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
