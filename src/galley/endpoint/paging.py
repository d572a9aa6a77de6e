"""Lists, a page at a time: the query parameters and the list object of the OpenAI API."""

from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from galley.endpoint.keys import Principal
from galley.errors import InvalidRequest, NotFound

__all__ = ["Page", "listing", "principal_of", "respond"]


def respond(found: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(found), status, media_type="application/json")


def principal_of(request: HTTPRequest) -> Principal:
    """Who asks."""
    found = request.scope.get("state", {}).get("principal", Principal())
    assert isinstance(found, Principal)
    return found


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a list."""

    limit: int
    after: str | None
    newest_first: bool
    more: dict[str, str]
    """The further parameters that were allowed."""

    @classmethod
    def read(
        cls, request: HTTPRequest, *, order: str = "desc", most: int = 100, allowed: tuple[str, ...] = ()
    ) -> "Page":
        """From the query string. Raises InvalidRequest for what is unknown or out of range."""
        query = request.query_params
        for name in query:
            if name not in ("limit", "after", "order", *allowed) and not (
                "metadata" in allowed and name.startswith("metadata[")
            ):
                raise InvalidRequest(
                    f"Unknown query parameter {name[:100]!r}.", param=name[:100], code="unknown_parameter"
                )
        limit = query.get("limit", str(min(20, most)))
        if not (limit.isascii() and limit.isdigit()) or not 1 <= int(limit[:9]) <= most:
            raise InvalidRequest(
                f"'limit' must be between 1 and {most}.", param="limit", code="invalid_value"
            )
        way = query.get("order", order)
        if way not in ("asc", "desc"):
            raise InvalidRequest("'order' must be 'asc' or 'desc'.", param="order", code="invalid_value")
        return cls(
            limit=int(limit),
            after=query.get("after"),
            newest_first=way == "desc",
            more={name: value for name, value in query.items() if name not in ("limit", "after", "order")},
        )

    def cut(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """This page of a list that is held in order of creation. Raises NotFound for ``after``."""
        if self.newest_first:
            items = items[::-1]
        if self.after is not None:
            places = [i for i, item in enumerate(items) if item["id"] == self.after]
            if not places:
                raise NotFound(f"There is no item {self.after[:100]!r} in this list.", param="after")
            items = items[places[0] + 1 :]
        return listing(items[: self.limit], more=len(items) > self.limit)


def listing(items: list[Any], *, more: bool) -> dict[str, Any]:
    """The list object."""
    ids = [item["id"] if isinstance(item, dict) else item.id for item in items]
    return {
        "object": "list",
        "data": items,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": more,
    }
