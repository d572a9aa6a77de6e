"""A model of the store, opened as the settings say."""

from galley.config import Config
from galley.model.model import Model
from galley.model.store import Entry
from galley.providers.opened import EngineOptions, Opened, disk_options

__all__ = ["open_entry", "options_of"]


def open_entry(config: Config, entry: Entry, kept: Model | None) -> Opened:
    """A model of the store, running as the settings say; ``kept`` is its file, when that is open already."""
    return Opened(
        entry.path,
        entry.name,
        options_of(config),
        model=kept,
        disk=disk_options(config),
        costs=config.home / "cost",
        measure=True,
    )


def options_of(config: Config) -> EngineOptions:
    """The engine's part of the settings."""
    return EngineOptions(**{name: getattr(config.engine, name) for name in EngineOptions.__struct_fields__})
