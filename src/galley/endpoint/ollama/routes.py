"""Ollama's paths over the same router and engine: ``galley serve --compat ollama``."""

from collections.abc import Callable

from starlette.routing import Route

from galley.endpoint.generate import Generate, Limits
from galley.endpoint.ollama.door import ChatRequests, GenerateRequests
from galley.endpoint.ollama.facts import ModelFacts
from galley.endpoint.ollama.pages import LoadOrAnswer, OllamaPages
from galley.providers.fleet import Fleet
from galley.router.router import Router

__all__ = ["ollama_routes"]


def ollama_routes(
    facts: Callable[[str], ModelFacts | None], fleet: Fleet | None
) -> Callable[[Router, Limits, bool], list[Route]]:
    """What ``build_app`` is given to answer Ollama's clients. ``facts`` as for ``OllamaPages``."""

    def make(router: Router, limits: Limits, capture: bool) -> list[Route]:
        stay = None if fleet is None else fleet.stay
        chat = Generate(router, ChatRequests(router, stay), limits=limits, capture=capture)
        generate = Generate(router, GenerateRequests(router, stay), limits=limits, capture=capture)
        message = {"message": {"role": "assistant", "content": ""}}
        return [
            Route(
                "/api/chat",
                LoadOrAnswer(chat, router, fleet, empty="messages", field=message, body_s=limits.body_s),
                methods=["POST"],
            ),
            Route(
                "/api/generate",
                LoadOrAnswer(
                    generate, router, fleet, empty="prompt", field={"response": ""}, body_s=limits.body_s
                ),
                methods=["POST"],
            ),
            *OllamaPages(router, facts, fleet, max_body=limits.body).routes(),
        ]

    return make
