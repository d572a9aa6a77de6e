"""From the catalog's provider tables to providers that can be asked."""

from collections.abc import Callable
from pathlib import Path

from galley.errors import ConfigError
from galley.providers.anthropic import AnthropicDialect
from galley.providers.dialect import Dialect, Timeouts
from galley.providers.http import Pool
from galley.providers.openai import OpenAIDialect
from galley.providers.remote import RemoteProvider
from galley.router.catalog import Catalog, ProviderTable

__all__ = ["open_providers", "stamp"]


def open_providers(
    catalog: Catalog, secret: Callable[[str], str | None], *, keyless: bool = False
) -> list[RemoteProvider]:
    """One provider for each table. Connects to nobody.

    Args:
        secret: an environment variable by name.
        keyless: do not look for keys (nothing will be sent).
    Raises ConfigError: a key that was named is not there, or a URL is none.
    """
    return [_open(catalog, table, secret, keyless=keyless) for table in catalog.tables.values()]


def _open(
    catalog: Catalog, table: ProviderTable, secret: Callable[[str], str | None], *, keyless: bool
) -> RemoteProvider:
    dialect: Dialect
    if table.kind == "anthropic":
        dialect = AnthropicDialect(table.name)
    else:
        dialect = OpenAIDialect(table.name, extended=table.extended, newer_limit=table.newer_limit)
    models = {
        offer.model: (offer.wire, offer.context)
        for offers in catalog.offers.values()
        for offer in offers
        if offer.provider == table.name
    }
    return RemoteProvider(
        table.name,
        Pool(table.url, connect_s=table.connect_s),
        dialect,
        models,
        key=None if keyless else _key(table, secret),
        location=table.location,
        timeouts=Timeouts(
            connect=table.connect_s,
            first=table.first_s,
            idle=table.idle_s,
            slow_chars=table.slow_chars,
            slow_s=table.slow_s,
        ),
        headers=table.headers,
        health_path=table.health_path,
    )


def _key(table: ProviderTable, secret: Callable[[str], str | None]) -> str | None:
    if table.key_env:
        found = secret(table.key_env)
        if found is None:
            raise ConfigError(f"provider {table.name!r}: the environment has no {table.key_env}")
    elif table.key_file:
        try:
            found = Path(table.key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"provider {table.name!r}: {table.key_file}: {error}") from error
    else:
        return None
    if not found or not found.isascii() or not found.isprintable():
        raise ConfigError(f"provider {table.name!r}: its key is empty or no plain text")
    return found


def stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file does; None while it is not there."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size
