"""Our own OpenAPI document: every route is in it, and schemathesis finds no fault and no lie."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from starlette.routing import Route

from galley.audit.feedback import FeedbackStore
from galley.audit.receipts import ReceiptStore
from galley.endpoint.access import Access
from galley.endpoint.app import build_app
from galley.endpoint.feedback import FeedbackPage
from galley.endpoint.openapi import document
from galley.endpoint.state import State
from galley.router.router import Router
from tests.unit.endpoint.fake import FakeProvider

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is in the group dev")
checks = pytest.importorskip("schemathesis.checks")
NOT_LISTED = {"/health", "/ready", "/metrics", "/openapi.json", "/v1/responses/compact"}

HOME = tempfile.TemporaryDirectory()
STORE = ReceiptStore(Path(HOME.name) / "receipts.db")
STATE = State(Path(HOME.name))
ROUTER = Router([FakeProvider(words=("a", "b"), context=100_000)], STORE)
FEEDBACK = FeedbackPage(ROUTER, STORE, FeedbackStore(Path(HOME.name) / "feedback.db"))
APP = build_app(ROUTER, STORE, state=STATE, feedback=FEEDBACK)


@pytest.fixture(scope="module", autouse=True)
def _tidy():
    yield
    STORE.close()
    STATE.close()
    HOME.cleanup()


def test_every_route_is_in_the_document():
    assert isinstance(APP, Access)
    served = {
        (method.lower(), route.path.replace(":path", ""))
        for route in APP._app._app.routes  # type: ignore[attr-defined]
        if isinstance(route, Route) and route.path not in NOT_LISTED
        for method in (route.methods or {"GET"}) - {"HEAD"}
    }
    listed = {(method, path) for path, item in document()["paths"].items() for method in item}
    endpoints = {path for _, path in listed}
    assert {path for _, path in served} == endpoints
    assert {pair for pair in listed if pair not in served} == set()


schema = schemathesis.openapi.from_asgi("/openapi.json", APP, headers={"host": "localhost"})


@schema.parametrize()
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_the_document_says(case):
    case.call_and_validate(
        headers={"host": "localhost"},
        checks=[
            checks.not_a_server_error,
            checks.status_code_conformance,
            checks.content_type_conformance,
            checks.response_schema_conformance,
        ],
    )
