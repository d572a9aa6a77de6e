"""The busiest paths, past the framework."""

from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Straight"]


class Straight:
    """The busiest paths without the way through the framework: they answer every error themselves."""

    def __init__(self, app: ASGIApp, posts: dict[str, ASGIApp]) -> None:
        self._app = app
        self._posts = posts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["method"] == "POST":
            app = self._posts.get(scope["path"], app)
        await app(scope, receive, send)
