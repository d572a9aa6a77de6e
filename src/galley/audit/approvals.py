"""Approvals: calls that wait until somebody says yes to exactly them.

    pending ──approve (enough)──▶ approved ──use──▶ used
       │ ├──deny──▶ denied            └──time──▶ expired
       │ └──time──▶ expired
       └──the asker leaves──▶ cancelled

An approval is bound to the SHA-256 of the call: kind, name, arguments, who asks, conversation, and the rule
that asked for it. It serves one call, once, until it expires. What takes several approvers takes different
ones, none of whom asked. The arguments are kept only while somebody has to read them.
"""

import contextlib
import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from galley.audit.assemble import receipt_id
from galley.audit.subjects import canonical
from galley.errors import GalleyError, InvalidRequest, NotFound, PermissionDenied

__all__ = ["NEEDED", "Approval", "Approvals", "Call", "Decision", "Refused"]

State = Literal["pending", "approved", "denied", "expired", "cancelled", "used"]
Tier = Literal["write", "destructive"]
NEEDED: dict[str, int] = {"write": 1, "destructive": 2}
"""Approvers by tier: destructive calls take four eyes."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS approvals (
    id TEXT PRIMARY KEY,
    call TEXT NOT NULL,
    state TEXT NOT NULL,
    created REAL NOT NULL,
    expires REAL NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS approvals_state ON approvals(state, created);
"""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be approved."""

    kind: Literal["tool", "request"]
    name: str
    """Of the tool; of a request, its model."""
    arguments: str
    """JSON as the model wrote it; of a request, what it may cost."""
    tenant: str
    user: str | None
    key: str | None
    session: str | None
    rule: str

    @property
    def digest(self) -> str:
        """The call in 64 hex digits. Arguments count as JSON where they are JSON, so spacing does not
        matter and everything else does."""
        try:
            arguments: Any = ["json", msgspec.json.decode(self.arguments)]
        except msgspec.DecodeError:
            arguments = ["text", self.arguments]
        parts = [self.kind, self.name, arguments, self.tenant, self.user, self.key, self.session, self.rule]
        return hashlib.sha256(b"galley call v1\n" + canonical(parts)).hexdigest()

    @property
    def asker(self) -> tuple[str, ...]:
        """Names under which who asks might approve."""
        return tuple(name for name in (self.key, self.user) if name is not None)


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What one approver said."""

    approver: str
    approve: bool
    time: float
    reason: str | None = None


class Approval(msgspec.Struct, frozen=True, kw_only=True):
    """One call and what became of it."""

    id: str
    call: str
    """Digest of the call."""
    state: State
    tier: str
    needed: int
    created: float
    expires: float
    kind: str
    name: str
    rule: str
    askers: tuple[str, ...] = ()
    arguments: str | None = None
    """Only while it is pending."""
    decisions: tuple[Decision, ...] = ()
    ended: float | None = None

    def leaf(self) -> dict[str, Any]:
        """What the audit log says of it. Approvers are named: answering for it is what they are there for."""
        return {
            "id": self.id,
            "call": self.call,
            "kind": self.kind,
            "name": self.name[:200],
            "rule": self.rule[:200],
            "tier": self.tier,
            "state": self.state,
            "asked": int(self.created * 1e6),
            "ended": None if self.ended is None else int(self.ended * 1e6),
            "decisions": [
                {"approver": d.approver[:200], "approve": d.approve, "time": int(d.time * 1e6)}
                for d in self.decisions
            ],
        }


class Refused(GalleyError):
    """A call that was denied, or not decided in time."""

    status = 403
    type = "permission_error"
    code = "approval_denied"
    exit_code = 5


class Approvals:
    """The queue, in a SQLite file; servers and command lines share it. Safe from any thread.

    Raises GalleyError ``approvals_unusable`` from every call when the file cannot be used.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self.path = path
        self._now = now
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def propose(self, call: Call, *, tier: str, ttl_s: float) -> Approval:
        """Put a call in the queue."""
        now = self._now()
        made = Approval(
            id="apr_" + receipt_id(now).removeprefix("rcp_"),
            call=call.digest,
            state="pending",
            tier=tier,
            needed=NEEDED[tier],
            created=now,
            expires=now + ttl_s,
            kind=call.kind,
            name=call.name,
            rule=call.rule,
            askers=call.asker,
            arguments=call.arguments,
        )
        with self._writing() as db:
            row = (made.id, made.call, made.state, made.created, made.expires, msgspec.json.encode(made))
            names = "id, call, state, created, expires, body"
            db.execute(f"INSERT INTO approvals({names}) VALUES (?, ?, ?, ?, ?, ?)", row)
        return made

    def decide(
        self, id: str, *, approver: str, approve: bool, reason: str | None = None, call: str | None = None
    ) -> Approval:
        """Say yes or no. One no ends it; it is approved once enough different people said yes.

        Args:
            call: digest of the call that the approver has seen; another one is refused.

        Raises NotFound, InvalidRequest (decided already, expired, another call), PermissionDenied (this
        approver may not: asked for it, or has said so already).
        """
        if not approver or len(approver) > 200:
            raise InvalidRequest("An approver needs a name of up to 200 characters.", param="approver")
        with self._writing() as db:
            found = self._current(db, id)
            if found.state != "pending":
                raise InvalidRequest(f"{id} is {found.state} already.", code="approval_not_pending")
            if call is not None and call != found.call:
                raise InvalidRequest(f"{id} is for another call.", code="approval_other_call")
            if approve and any(each.approver == approver for each in found.decisions):
                raise PermissionDenied(f"{approver!r} has approved {id} already; it takes somebody else.")
            if approve and found.needed > 1 and approver in found.askers:
                raise PermissionDenied(f"{approver!r} asked for {id}; it takes others to approve it.")
            said = Decision(approver=approver, approve=approve, time=self._now(), reason=reason)
            decisions = (*found.decisions, said)
            state: State = "pending"
            if not approve:
                state = "denied"
            elif len(decisions) >= found.needed:
                state = "approved"
            return self._put(db, msgspec.structs.replace(found, decisions=decisions), state)

    def use(self, id: str, call: Call) -> Approval:
        """Spend an approval on its call. Raises Refused unless it is approved, for exactly this, not expired,
        and not used yet; whoever comes second gets Refused."""
        with self._writing() as db:
            found = self._current(db, id)
            if found.state != "approved":
                raise Refused(f"{id} is {found.state}.", code=f"approval_{found.state}")
            if found.call != call.digest:
                raise Refused(f"{id} was given for another call.", code="approval_other_call")
            return self._put(db, found, "used")

    def cancel(self, id: str) -> Approval:
        """Who asked has left. What has ended already stays as it ended."""
        with self._writing() as db:
            found = self._current(db, id)
            return self._put(db, found, "cancelled") if found.state in ("pending", "approved") else found

    def get(self, id: str) -> Approval:
        """One of them, expired if its time is over. Raises NotFound."""
        with self._reading() as db:
            found = self._find(db, id)
        if found.state in ("pending", "approved") and self._now() >= found.expires:
            with self._writing() as db:
                return self._current(db, id)
        return found

    def list(self, state: str | None = "pending", limit: int = 100) -> list[Approval]:
        """Oldest first; all of them with ``state`` None."""
        with self._writing() as db:
            over = "state IN ('pending', 'approved') AND expires <= ?"
            for (id,) in db.execute(f"SELECT id FROM approvals WHERE {over}", (self._now(),)).fetchall():
                self._current(db, id)
            where = "" if state is None else "WHERE state = ?"
            rows = db.execute(
                f"SELECT body FROM approvals {where} ORDER BY created, id LIMIT ?",
                (*(() if state is None else (state,)), limit),
            ).fetchall()
        return [msgspec.json.decode(row[0], type=Approval) for row in rows]

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    # ---- the file

    def _current(self, db: sqlite3.Connection, id: str) -> Approval:
        """As it is now: what has run out of time is expired first."""
        found = self._find(db, id)
        if found.state in ("pending", "approved") and self._now() >= found.expires:
            return self._put(db, found, "expired")
        return found

    @staticmethod
    def _find(db: sqlite3.Connection, id: str) -> Approval:
        row = db.execute("SELECT body FROM approvals WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise NotFound(f"There is no approval {id[:100]!r}.", param="id")
        return msgspec.json.decode(row[0], type=Approval)

    def _put(self, db: sqlite3.Connection, approval: Approval, state: State) -> Approval:
        ended = None if state in ("pending", "approved") else self._now()
        arguments = approval.arguments if state == "pending" else None
        made = msgspec.structs.replace(approval, state=state, ended=ended, arguments=arguments)
        row = (state, msgspec.json.encode(made), made.id)
        db.execute("UPDATE approvals SET state = ?, body = ? WHERE id = ?", row)
        return made

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._connect()
            except sqlite3.Error as error:
                raise GalleyError(f"{self.path}: {error}", code="approvals_unusable") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Committed also when a rule refuses: what expired on the way stays expired."""
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except GalleyError:
                db.execute("COMMIT")
                raise
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _connect(self) -> sqlite3.Connection:
        if self._db is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self.path, timeout=5.0, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA secure_delete=ON")
            db.executescript(SCHEMA)
            self._db = db
        return self._db
