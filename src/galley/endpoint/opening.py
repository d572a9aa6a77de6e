"""A model of the store, opened as the settings say."""

from galley.config import Config
from galley.model.model import Model
from galley.model.store import Entry, Store
from galley.providers.adapters import Adapters
from galley.providers.opened import Opened, disk_options, options_of

__all__ = ["open_entry"]


def open_entry(config: Config, entry: Entry, kept: Model | None, had: Adapters | None = None) -> Opened:
    """A model of the store, run by the settings, with the file and the adapters that it had open before."""
    return Opened(
        entry.path,
        entry.name,
        options_of(config),
        model=kept,
        disk=disk_options(config),
        costs=config.home / "cost",
        measure=True,
        lora=config.engine.lora if Store(config.home).resolve(config.model) == entry else (),
        adapters=had,
    )
