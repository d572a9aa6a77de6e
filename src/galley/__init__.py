"""Galley: a Request goes in; a stream of Deltas and one Receipt come out.

The public face is five names, loaded on first use so that ``galley --version`` stays quick.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "Engine", "SamplingParams", "StructuredOutputs", "__version__", "serve"]

if TYPE_CHECKING:
    from galley.endpoint.serve import serve
    from galley.llm import LLM
    from galley.runtime.engine import Engine
    from galley.types import SamplingParams, StructuredOutputs

_WHERE = {
    "LLM": "galley.llm",
    "Engine": "galley.runtime.engine",
    "SamplingParams": "galley.types",
    "StructuredOutputs": "galley.types",
    "serve": "galley.endpoint.serve",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'galley' has no attribute {name!r}")
