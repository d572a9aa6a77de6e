"""Reports say what the ledger's lines say, to the last digit, in every form."""

import csv
import io
import json
import random
import re
import sqlite3
from datetime import date, timedelta
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from galley.audit.log import AuditLog
from galley.audit.note import Signer
from galley.cli.cost_page import page
from galley.cli.main import invoke
from galley.economics.acts import Subject
from galley.economics.amount import Amount
from galley.economics.bill import Rival, bill
from galley.economics.forecast import forecast
from galley.economics.limits import Margin, Rule
from galley.economics.price import PriceVersion
from galley.economics.report import Report, report, rounded
from galley.economics.scope import Party
from galley.economics.sheet import as_csv, as_json, sheets
from galley.economics.store import Store
from galley.types import Usage
from tests.ledger import opening, settlement

PRICE = PriceVersion(
    id="test/m@always", input=150_007, output=600_011, cached=15_013, cache_write=150_007, draft_saving=31
)
DEAR = msgspec.structs.replace(PRICE, id="dear", input=900_001, output=3_000_017)
RIVAL = Rival(name="big@dear", price=DEAR)
PLANS: dict[str, tuple[str | None, Margin]] = {
    "alice": ("free", Margin(None)),
    "=HYPERLINK(1)": ("saas", Margin(6000)),
    '<b>"bob"</b>, & co': ("enterprise", Margin(3000)),
    "käthe": (None, Margin(0)),
}
"""Plan and margin of each user."""
TODAY = date(2026, 11, 21)
SINCE, UNTIL = "2026-11-01", "2026-11-22"


def fill(store: Store, count: int, seed: int = 7) -> None:
    """Requests of every kind over October and November, some failed, some corrected later."""
    rng = random.Random(seed)
    for user, (plan, _) in PLANS.items():
        if plan is not None:
            store.set_rule(f"user:{user}", lambda _, plan=plan: Rule(plan=plan))
    for number in range(count):
        user = rng.choice(list(PLANS))
        plan, margin = PLANS[user]
        tags = tuple(sorted(rng.sample(("project=a", "project=b", "team=x"), rng.randrange(3))))
        party = Party(tenant="t", org="acme", user=user, key=f"key_{number % 3}", tags=tags)
        subject = Subject(party=party, api="chat", model="m", provider="p", plan=plan, margin=margin)
        prompt = rng.randrange(1, 9000)
        usage = Usage(
            prompt_tokens=prompt,
            cached_tokens=rng.choice((0, prompt // 3)),
            completion_tokens=rng.randrange(900),
            accepted_tokens=rng.choice((0, 11)),
        )
        made = bill(subject, "p", PRICE, usage, rival=RIVAL if rng.random() < 0.5 else None)
        spent = Amount(made.cost_pico, usage.total_tokens, 1)
        day = (date(2026, 10, 5) + timedelta(days=rng.randrange(48))).isoformat()
        opened = msgspec.structs.replace(
            opening(f"r{number}", party, spent, day=day, price=PRICE, enforce=False), subject=subject
        )
        ended = settlement(
            f"r{number}",
            spent,
            usage=usage,
            entries=made.entries,
            price=PRICE,
            prices=(RIVAL.price,),
            status=rng.choice(("ok", "ok", "ok", "error", "cancelled")),
        )
        store.apply([opened])
        if number % 10 == 0:  # a reaper was there first, and knew less
            less = bill(subject, "p", PRICE, Usage(prompt_tokens=prompt, cached_tokens=usage.cached_tokens))
            early = settlement(
                f"r{number}",
                Amount(less.cost_pico, prompt, 1),
                usage=Usage(prompt_tokens=prompt, cached_tokens=usage.cached_tokens),
                entries=less.entries,
                price=PRICE,
                outcome="expired",
                estimated=True,
            )
            store.apply([early])
        store.apply([ended])


def by_hand(store: Store, kind: str) -> int:
    """A sum over the lines themselves, one by one, in this process's integers."""
    with store.reading() as db:
        rows = db.execute(
            text(
                "SELECT source, target, pico FROM line JOIN txn ON txn.id = txn WHERE day >= :a AND day < :b"
            ),
            {"a": SINCE, "b": UNTIL},
        ).all()
    return sum(
        pico * (target.startswith(kind + ":") - source.startswith(kind + ":"))
        for source, target, pico in rows
    )


def exact(shown: str) -> int:
    """Pico-dollars of ``$0.00001875``."""
    found = re.fullmatch(r"(-?)\$?(-?)([0-9]+)\.([0-9]{2,12})", shown)
    assert found is not None, shown
    pico = int(found[3]) * 10**12 + int(found[4].ljust(12, "0"))
    return -pico if found[1] or found[2] else pico


class Tables(HTMLParser):
    """The text of every cell, table by table."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._cell = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture
def wanted(store: Store) -> dict[str, int]:
    fill(store, 120)
    return {kind: by_hand(store, kind) for kind in ("expense", "receivable", "saving")}


def made(store: Store, *by: str) -> Report:
    return report(store, by, since=SINCE, until=UNTIL, today=TODAY)


def test_every_form_says_what_the_lines_say(store: Store, wanted: dict[str, int]) -> None:
    found = made(store, "user", "plan")
    assert found.good and found.exact and all(wanted.values())
    figures = [wanted["expense"], wanted["receivable"], wanted["saving"]]
    assert [found.total.cost_pico, found.total.revenue_pico, found.total.saved_pico] == figures

    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    (last,) = (row for row in rows if row["row"] == "total")
    groups = [row for row in rows if row["row"] == "group"]
    for name, figure in (("cost", figures[0]), ("revenue", figures[1])):
        assert int(last[f"{name}_pico"]) == exact(last[f"{name}_usd"]) == figure
        assert sum(int(row[f"{name}_pico"]) for row in groups) == figure
        assert sum(exact(row[f"{name}_usd"]) for row in groups) == figure
    assert (
        sum(int(last[f"{kind}_saved_pico"]) for kind in ("cache", "route", "batch", "speculation"))
        == figures[2]
    )
    assert sum(int(row["charges"]) for row in groups) == int(last["charges"]) == found.total.charges

    plain = json.loads(msgspec.json.encode(as_json(found)))
    for name, figure in zip(("cost", "revenue", "saved"), figures, strict=True):
        assert int(plain["total"][f"{name}_pico"]) == exact(plain["total"][f"{name}_usd"]) == figure
        assert int(plain["ledger"][f"{name}_pico"]) == figure
        assert sum(int(group[f"{name}_pico"]) for group in plain["groups"]) == figure
    assert sum(int(each["saved_pico"]) for each in plain["savings"]) == figures[2]
    assert sum(int(each["margin_pico"]) for each in plain["plans"]) == figures[1] - figures[0]

    parsed = Tables()
    parsed.feed(page(found))
    spending = parsed.tables[0]
    assert spending == [list(row) for row in (sheets(found)[0].head, *sheets(found)[0].rows)], (
        "escaped and back"
    )
    assert [exact(cell) for cell in spending[-1][-3:]] == figures
    for column, figure in zip((-3, -2, -1), figures, strict=True):
        assert sum(exact(row[column]) for row in spending[1:-1]) == figure


def test_the_command_prints_the_ledgers_totals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GALLEY_HOME", str(tmp_path))
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    fill(store, 60)
    figures = [by_hand(store, kind) for kind in ("expense", "receivable", "saving")]
    store.close()
    span = ["--since", SINCE, "--until", UNTIL]
    assert invoke(["cost", "--by", "user,day", *span]) == 0
    table = capsys.readouterr().out
    total = next(line for line in table.splitlines() if line.startswith("total")).split()
    assert [exact(cell) for cell in total[-3:]] == figures
    assert invoke(["cost", "--by", "tag", "--json", *span]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert [int(plain["total"][f"{name}_pico"]) for name in ("cost", "revenue", "saved")] == figures
    assert sum(int(each["cost_pico"]) for each in plain["groups"]) > figures[0], "of several tags, in several"
    assert invoke(["cost", "--csv", "-", *span]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert [int(row["cost_pico"]), int(row["revenue_pico"])] == figures[:2]
    log = AuditLog(tmp_path / "audit", Signer.kept(tmp_path / "audit.key"), sync=lambda fd: None)
    log.append([b'{"id":"rcp_1","type":"request"}'])
    log.close()
    assert plain["audit_checkpoint"] is None
    assert invoke(["cost", "--json", *span]) == 0
    said = json.loads(capsys.readouterr().out)["audit_checkpoint"]
    assert [said["origin"], said["size"], said["root"]] == (tmp_path / "audit/checkpoint").read_text(
        encoding="utf-8"
    ).splitlines()[:3]
    out = tmp_path / "page.html"
    assert invoke(["cost", "--by", "user", "--html", str(out), *span]) == 0
    parsed = Tables()
    parsed.feed(out.read_text(encoding="utf-8"))
    assert [exact(cell) for cell in parsed.tables[0][-1][-3:]] == figures
    assert "<svg" in out.read_text(encoding="utf-8") and "<b>" not in out.read_text(encoding="utf-8")
    for words in (["--by", "colour"], ["--since", "x"], ["--json", "--csv", "-"], ["--since", "2999-01-01"]):
        assert invoke(["cost", *words]) == 2
    assert invoke(["cost", "--html", str(tmp_path / "no" / "page.html"), *span]) == 2


def test_an_empty_ledger_has_a_report(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    found = made(store, "user")
    assert found.good and found.groups == [] and found.success_pico is None and found.forecast is None
    assert "<svg" not in page(found) and as_csv(found).count("\n") == 2
    store.close()


def test_names_reach_no_spreadsheet_as_formulas(store: Store, wanted: dict[str, int]) -> None:
    assert wanted
    names = [row["user"] for row in csv.DictReader(io.StringIO(as_csv(made(store, "user"))))]
    assert "'=HYPERLINK(1)" in names and '<b>"bob"</b>, & co' in names


def test_a_request_without_a_stored_price_is_counted(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    fill(store, 20)
    assert made(store).unpriced == 0
    with store.reading() as db:
        count = db.execute(
            text("SELECT COUNT(*) FROM charge WHERE n = 0 AND day >= :a AND day < :b"),
            {"a": SINCE, "b": UNTIL},
        ).scalar_one()
    store.close()
    with sqlite3.connect(tmp_path / "ledger.db") as raw:
        for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            raw.execute(f"DROP TRIGGER {name}")
        raw.execute("DELETE FROM price_version WHERE id = ?", (PRICE.id,))
    raw.close()
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    found = made(store)
    assert found.unpriced == count > 0 and not found.good
    store.close()


def test_charges_that_differ_from_the_lines_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GALLEY_HOME", str(tmp_path))
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    fill(store, 20)
    store.close()
    with sqlite3.connect(tmp_path / "ledger.db") as raw:
        for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            raw.execute(f"DROP TRIGGER {name}")
        raw.execute("UPDATE charge SET cost_pico = cost_pico + 1 WHERE day = (SELECT MAX(day) FROM charge)")
    raw.close()
    assert invoke(["cost", "--since", SINCE, "--until", UNTIL]) == 1
    assert "not those of the ledger's lines" in capsys.readouterr().err


def test_movers_plans_and_successes(store: Store, wanted: dict[str, int]) -> None:
    found = made(store, "user", "day")
    assert found.movers_by == ("user",) and found.compared == "2026-10-11"
    assert found.movers == sorted(found.movers, key=lambda e: -abs(e.change_pico)) and found.movers
    free = next(each for each in found.plans if each.plan == "free")
    assert free.revenue_pico == 0 and free.margin_pico == -free.cost_pico and free.margin_points is None
    saas = next(each for each in found.plans if each.plan == "saas")
    assert saas.margin_points == 6000
    assert 0 < found.succeeded < found.total.charges
    assert found.success_pico == rounded(wanted["expense"], found.succeeded)
    assert {(each.by, each.against) for each in found.savings} == {
        ("cache", "uncached"), ("route", "big@dear"), ("speculation", "undrafted"),
    }  # fmt: skip


@given(st.integers(-(10**20), 10**20), st.integers(1, 10**6))
def test_rounding_is_half_to_even(amount: int, parts: int) -> None:
    assert rounded(amount, parts) == round(Fraction(amount, parts))


@settings(max_examples=50)
@given(st.integers(2, 28), st.integers(0, 10**13))
def test_a_steady_month_is_forecast_exactly(days: int, pico: int) -> None:
    today = date(2026, 11, 29)
    past = {(today - timedelta(days=back)).isoformat(): pico for back in range(1, days + 1)}
    found = forecast(past, today)
    assert found is not None and found.low == found.estimate == found.high == found.spent + 2 * pico
    assert found.days == days and found.month == "2026-11"


def test_forecasts_hold_nine_times_in_ten() -> None:
    rng, held = random.Random(3), 0
    for _ in range(1000):
        month = {date(2026, 11, day).isoformat(): int(rng.gauss(10**12, 2 * 10**11)) for day in range(1, 31)}
        known = {day: pico for day, pico in month.items() if day < "2026-11-13"}
        found = forecast(known, date(2026, 11, 13))
        assert found is not None and found.spent <= found.low <= found.estimate <= found.high
        held += found.low <= sum(month.values()) <= found.high
    assert 870 <= held <= 930, held


def test_a_forecast_needs_two_days_and_never_falls_below_what_is_spent() -> None:
    today = date(2026, 11, 13)
    assert forecast({}, today) is None and forecast({"2026-11-12": 5}, today) is None
    found = forecast({"2026-11-11": 1, "2026-11-12": 1, "2026-11-13": 10**6}, today)
    assert found is not None and found.spent == found.low == found.estimate == 10**6 + 2
