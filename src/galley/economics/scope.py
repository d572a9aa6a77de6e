"""Who and what a budget can be set for, and the names of their accounts.

A scope is written ``kind:name``, such as ``user:alice`` or ``tag:project=apollo``. Every request belongs to
several at once, and is counted in each of them.
"""

from datetime import UTC, datetime

import msgspec

from galley.errors import InvalidRequest

__all__ = ["EVERYBODY", "KINDS", "Party", "check_scope", "resets_s", "windows"]

KINDS = ("server", "org", "team", "user", "key", "session", "tag", "plan")
"""``server:all`` is everybody together; ``plan`` is a template, and counts nothing."""
EVERYBODY = "server:all"
LONGEST = 200


class Party(msgspec.Struct, frozen=True, kw_only=True):
    """On whose account a request runs. None where it is not known.

    Attributes:
        tenant: who is charged (``revenue:<tenant>``).
        session: an agent's run; its budgets have no calendar.
        tags: ``key=value`` of the request's metadata.
    """

    tenant: str = "local"
    org: str | None = None
    team: str | None = None
    user: str | None = None
    key: str | None = None
    session: str | None = None
    tags: tuple[str, ...] = ()

    def scopes(self, tags: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Every scope it is counted in, widest first. Of its tags only those in ``tags``: metadata may hold
        a different value in every request, and nobody wants a counter for each."""
        named = (
            ("org", self.org),
            ("team", self.team),
            ("user", self.user or self.tenant),
            ("key", self.key),
            ("session", self.session),
        )
        found = [EVERYBODY, *(f"{kind}:{name}" for kind, name in named if name)]
        found += [f"tag:{tag}" for tag in self.tags if f"tag:{tag}" in tags]
        return tuple(found)


def check_scope(text: str) -> str:
    """Itself. Raises InvalidRequest when it is no scope; ``kind:*`` is for those without their own rule."""
    kind, colon, name = text.partition(":")
    if kind not in KINDS or not colon or not name or len(text) > LONGEST or not name.isprintable():
        raise InvalidRequest(
            f"{text[:100]!r} is no scope. Scopes are KIND:NAME with a kind of {', '.join(KINDS)}.",
            param="scope",
            hint="Such as user:alice, team:red, tag:project=apollo, user:* for every user, server:all.",
        )
    if kind == "server" and text != EVERYBODY:
        raise InvalidRequest(f"The one scope of the kind 'server' is {EVERYBODY}.", param="scope")
    if kind == "tag" and "=" not in name:
        raise InvalidRequest("A tag is KEY=VALUE, as in the metadata of requests.", param="scope")
    return text


def windows(scope: str, day: str) -> tuple[str, ...]:
    """The counters of a scope on a UTC day (``2026-11-21``): the day, its month, and all time. A session has
    the last alone."""
    return ("total",) if scope.startswith("session:") else (day, day[:7], "total")


def resets_s(window: str, now: float) -> float | None:
    """Seconds until the next day or month in UTC begins; None where nothing ever resets it."""
    if window not in ("day", "month"):
        return None
    moment = datetime.fromtimestamp(now, UTC)
    if window == "day":
        return 86_400 - (now % 86_400)
    year, month = (moment.year + 1, 1) if moment.month == 12 else (moment.year, moment.month + 1)
    return datetime(year, month, 1, tzinfo=UTC).timestamp() - now
