"""Approvals: single use, bound to the call, expiring, four eyes; against a model of the rules."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from galley.audit.approvals import NEEDED, Approvals, Call, Refused
from galley.audit.warden import Warden
from galley.errors import InvalidRequest, NotFound, PermissionDenied
from galley.types import Delta, Request, SamplingParams, ToolCallDelta


def call(arguments: str = '{"path": "/a"}', **fields: object) -> Call:
    given = {
        "kind": "tool", "name": "delete", "arguments": arguments, "tenant": "acme",
        "user": "alice", "key": "key_1", "session": None, "rule": "delete*",
    }  # fmt: skip
    return Call(**(given | fields))


def test_a_call_is_its_meaning_not_its_spelling() -> None:
    assert call('{"a":1,"b":2}').digest == call('{ "b": 2, "a": 1 }').digest
    other = [
        call('{"a":1,"b":3}'), call('{"a":1}'), call("not json"), call('"not json"'),
        *(call('{"a":1,"b":2}', **{n: "x"}) for n in ("name", "tenant", "user", "key", "session", "rule")),
        call('{"a":1,"b":2}', kind="request"),
    ]  # fmt: skip
    digests = {each.digest for each in other} | {call('{"a":1,"b":2}').digest}
    assert len(digests) == len(other) + 1


class Rules(RuleBasedStateMachine):
    """Any order of proposing, deciding, using, cancelling and time, on a real file, beside a plain model."""

    ids = Bundle("ids")
    people = st.sampled_from(["alice", "key_1", "bob", "carol", "dave"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.now = 1000.0
        self.queue = Approvals(Path(self.folder.name) / "a.db", now=lambda: self.now)
        self.model: dict[str, dict] = {}
        self.used: list[str] = []

    def teardown(self) -> None:
        self.queue.close()
        self.folder.cleanup()

    @rule(
        target=ids,
        number=st.integers(0, 2),
        tier=st.sampled_from(sorted(NEEDED)),
        ttl=st.sampled_from([5, 50]),
    )
    def propose(self, number: int, tier: str, ttl: int) -> str:
        made = self.queue.propose(call(str(number)), tier=tier, ttl_s=ttl)
        self.model[made.id] = {
            "state": "pending", "call": number, "yes": set(), "needed": NEEDED[tier], "ends": self.now + ttl,
        }  # fmt: skip
        return made.id

    @rule(seconds=st.sampled_from([1, 5, 30]))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        for each in self.model.values():
            if each["state"] in ("pending", "approved") and self.now >= each["ends"]:
                each["state"] = "expired"

    @rule(id=ids, who=people, approve=st.booleans(), other=st.booleans())
    def decide(self, id: str, who: str, approve: bool, other: bool) -> None:
        each = self.model[id]
        digest = call(str(each["call"] + 1 if other else each["call"])).digest
        refused = None
        if each["state"] != "pending" or other:
            refused = InvalidRequest
        elif approve and (who in each["yes"] or (each["needed"] > 1 and who in ("alice", "key_1"))):
            refused = PermissionDenied
        if refused is not None:
            with pytest.raises(refused):
                self.queue.decide(id, approver=who, approve=approve, call=digest)
            return
        self.queue.decide(id, approver=who, approve=approve, call=digest)
        if approve:
            each["yes"].add(who)
            each["state"] = "approved" if len(each["yes"]) >= each["needed"] else "pending"
        else:
            each["state"] = "denied"

    @rule(id=ids, number=st.integers(0, 2))
    def use(self, id: str, number: int) -> None:
        each = self.model[id]
        if each["state"] == "approved" and number == each["call"]:
            self.queue.use(id, call(str(number)))
            each["state"] = "used"
            self.used.append(id)
        else:
            with pytest.raises(Refused):
                self.queue.use(id, call(str(number)))

    @rule(id=ids)
    def cancel(self, id: str) -> None:
        self.queue.cancel(id)
        if self.model[id]["state"] in ("pending", "approved"):
            self.model[id]["state"] = "cancelled"

    @rule()
    def reopen(self) -> None:
        self.queue.close()

    @invariant()
    def as_the_model(self) -> None:
        assert len(self.used) == len(set(self.used)), "an approval is spent once"
        for id, each in self.model.items():
            found = self.queue.get(id)
            assert found.state == each["state"]
            assert (found.arguments is not None) == (found.state == "pending")
            if found.state in ("approved", "used"):
                assert len({d.approver for d in found.decisions if d.approve}) >= found.needed

    @precondition(lambda self: self.model)
    @rule()
    def lists(self) -> None:
        waiting = {id for id, each in self.model.items() if each["state"] == "pending"}
        assert {each.id for each in self.queue.list()} == waiting


Rules.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestApprovalsMachine = Rules.TestCase


def test_what_is_no_approval(tmp_path: Path) -> None:
    queue = Approvals(tmp_path / "a.db")
    with pytest.raises(NotFound):
        queue.get("apr_x")
    made = queue.propose(call(), tier="write", ttl_s=60)
    with pytest.raises(InvalidRequest):
        queue.decide(made.id, approver="", approve=True)
    queue.close()


# ---- waiting


def asked(**fields: object) -> Request:
    given = {
        "id": "r",
        "api": "chat",
        "model": "m",
        "params": SamplingParams(),
        "created": 1.0,
        "user": "ann",
    }
    return Request(**(given | fields))


async def said(*names: str) -> AsyncIterator[Delta]:
    yield Delta(index=0, text="let me see")
    for number, name in enumerate(names):
        yield Delta(index=0, tool_calls=[ToolCallDelta(index=number, id="c", name=name, arguments='{"a"')])
        yield Delta(index=0, tool_calls=[ToolCallDelta(index=number, arguments=": 1}")])
    yield Delta(index=0, finish="tool_calls")


class Watch:
    """A warden and what came through it."""

    def __init__(self, folder: Path, ttl_s: float = 30.0) -> None:
        self.queue = Approvals(folder / "a.db")
        tools = [("delete_*", "destructive"), ("send", "write")]
        self.warden = Warden(self.queue, tools=tools, above_pico=100, ttl_s=ttl_s)
        self.through: list[Delta] = []
        self.stopped = 0
        self.noted: list[dict] = []

    async def stop(self) -> None:
        self.stopped += 1

    async def run(self, *names: str) -> None:
        async for delta in self.warden.watch(asked(), said(*names), self.stop, self.noted):
            self.through.append(delta)

    async def waiting(self) -> str:
        for _ in range(600):
            found = self.queue.list()
            if found:
                return found[0].id
            await asyncio.sleep(0.02)
        raise AssertionError("nothing waits")


async def test_free_tools_go_straight_through(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    await watch.run("look", "read")
    assert len(watch.through) == 6 and not watch.noted and not watch.stopped
    assert watch.queue.list(None) == []


async def test_a_held_call_goes_on_once_approved_and_the_run_is_over_meanwhile(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    task = asyncio.ensure_future(watch.run("look", "send"))
    id = await watch.waiting()
    assert watch.stopped == 1, "nothing runs or is metered while it waits"
    assert [d.tool_calls[0].name for d in watch.through if d.tool_calls][:1] == ["look"]
    assert not any(d.finish or (d.tool_calls and d.tool_calls[0].name == "send") for d in watch.through)
    waiting = watch.queue.get(id)
    assert (waiting.name, waiting.arguments, waiting.needed) == ("send", '{"a": 1}', 1)
    # By another process, as the command line does.
    Approvals(tmp_path / "a.db").decide(id, approver="bob", approve=True)
    await task
    assert len(watch.through) == 6 and watch.through[-1].finish == "tool_calls"
    (noted,) = watch.noted
    assert noted["state"] == "used" and noted["decisions"][0]["approver"] == "bob" and noted["waited_ms"] >= 0


@pytest.mark.parametrize("deny", [True, False])
async def test_a_denied_or_forgotten_call_never_goes_out(tmp_path: Path, deny: bool) -> None:
    watch = Watch(tmp_path, ttl_s=30.0 if deny else 0.05)
    task = asyncio.ensure_future(watch.run("send"))
    if deny:
        watch.queue.decide(await watch.waiting(), approver="bob", approve=False, reason="not today")
    with pytest.raises(Refused) as caught:
        await task
    assert caught.value.code == ("approval_denied" if deny else "approval_expired")
    assert not deny or "bob: not today" in caught.value.message
    assert not any(delta.tool_calls for delta in watch.through)
    assert watch.noted[0]["state"] == ("denied" if deny else "expired")


async def test_four_eyes(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    task = asyncio.ensure_future(watch.run("delete_all"))
    id = await watch.waiting()
    with pytest.raises(PermissionDenied):
        watch.queue.decide(id, approver="ann", approve=True)
    watch.queue.decide(id, approver="bob", approve=True)
    with pytest.raises(PermissionDenied):
        watch.queue.decide(id, approver="bob", approve=True)
    assert watch.queue.get(id).state == "pending"
    watch.queue.decide(id, approver="carol", approve=True)
    await task
    assert [d["approver"] for d in watch.noted[0]["decisions"]] == ["bob", "carol"]


async def test_who_leaves_takes_the_request_along(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    task = asyncio.ensure_future(watch.run("send"))
    id = await watch.waiting()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert watch.queue.get(id).state == "cancelled" and watch.noted[0]["state"] == "cancelled"


async def test_dear_requests_wait_before_they_run(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    await watch.warden.let_in(asked(), 100, watch.noted)
    await watch.warden.let_in(asked(), None, watch.noted)
    assert not watch.noted
    task = asyncio.ensure_future(watch.warden.let_in(asked(), 101, watch.noted))
    watch.queue.decide(await watch.waiting(), approver="bob", approve=True)
    await task
    assert watch.noted[0]["kind"] == "request" and watch.noted[0]["state"] == "used"


def test_the_leaf_of_an_approval_has_no_arguments(tmp_path: Path) -> None:
    queue = Approvals(tmp_path / "a.db")
    made = queue.propose(call('{"secret": "s3cr3t"}'), tier="write", ttl_s=60)
    assert b"s3cr3t" not in msgspec.json.encode(made.leaf())
    queue.decide(made.id, approver="bob", approve=True)
    queue.close()
    assert b"s3cr3t" not in (tmp_path / "a.db").read_bytes()
