"""What the tests of the ledger share: requests, settlements, and databases to put them in."""

import itertools
import os
import time
from typing import Any

import psycopg
from sqlalchemy import select
from sqlalchemy.engine import make_url

from galley.economics import schema
from galley.economics.acts import Entry, Opening, Settlement, Subject
from galley.economics.amount import Amount
from galley.economics.price import PriceVersion
from galley.economics.scope import Party
from galley.economics.store import Store
from galley.types import Usage

PRICE = PriceVersion(id="test/m@always", input=2, output=10, cached=1, cache_write=3)
DAY = "2026-11-21"
NUMBERS = itertools.count()


def fresh_database(server: str) -> str:
    """A new empty database on a PostgreSQL."""
    url = make_url(server)
    name = f"ledger_{os.getpid()}_{next(NUMBERS)}"
    with psycopg.connect(
        host=str(url.query["host"]), user=url.username, dbname="postgres", autocommit=True
    ) as db:
        db.execute(f"CREATE DATABASE {name}")
    return url.set(database=name).render_as_string(hide_password=False)


def opening(id: str, party: Party, need: Amount, **more: Any) -> Opening:
    """A request's reservation."""
    now = time.time_ns() // 1000
    fields: dict[str, Any] = {
        "rate_tokens": need.tokens,
        "price": PRICE,
        "owner": "host:1:dead",
        "now_us": now,
        "day": DAY,
        "lease_us": now + 60_000_000,
    }
    subject = Subject(party=party, api="chat.completions", model="m", provider="p")
    return Opening(id=id, subject=subject, need=need, **(fields | more))


def settlement(id: str, spent: Amount, **more: Any) -> Settlement:
    """What it cost, all of it money to one provider."""
    fields: dict[str, Any] = {
        "usage": Usage(prompt_tokens=spent.tokens),
        "entries": (
            Entry(source="payable:p", target="expense:p", pico=spent.pico, version=PRICE.id, kind="input"),
            Entry(
                source="revenue:t", target="receivable:t", pico=spent.pico, version=PRICE.id, kind="revenue"
            ),
        ),
        "price": PRICE,
        "provider": "p",
        "model": "m",
        "now_us": time.time_ns() // 1000,
    }
    return Settlement(id=id, spent=spent, **(fields | more))


def counters(store: Store) -> dict[tuple[str, str], tuple[Amount, Amount]]:
    """As stored: (scope, span) to (spent, reserved)."""
    with store.reading() as db:
        return {
            (row.scope, row.span): (
                Amount(row.spent_pico, row.spent_tokens, row.spent_requests, row.spent_slots),
                Amount(row.reserved_pico, row.reserved_tokens, row.reserved_requests, row.reserved_slots),
            )
            for row in db.execute(select(schema.counter))
        }
