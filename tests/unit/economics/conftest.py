"""Ledgers on both databases."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from galley.economics.store import Store
from tests.ledger import fresh_database
from tests.postgres import missing, postgres


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL."""
    why = missing()
    if why is not None:
        pytest.skip(why)
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    return fresh_database(request.getfixturevalue("server"))


@pytest.fixture
def opened(url: str) -> Iterator[Callable[[], Store]]:
    """Makes stores over one database, each as a process of its own would have."""
    stores: list[Store] = []

    def make() -> Store:
        stores.append(Store(url, tries_s=60.0, busy_s=30.0))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Callable[[], Store]) -> Store:
    """One of them."""
    return opened()
