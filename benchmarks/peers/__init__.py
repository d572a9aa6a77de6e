"""The engines that are compared with Galley: how each is installed, fed, started, served and described.

``python -m benchmarks.peers`` installs every peer into ``.bench/`` and prints what it got. To add one: a
``Peer`` here, and a driver that speaks ``benchmarks.protocol`` in ``benchmarks/drivers``.
"""

from collections.abc import Callable

from benchmarks.peers.base import BENCH, Model, Peer, Unsupported
from benchmarks.peers.llamacpp import LlamaCpp
from benchmarks.peers.onnxruntime import OnnxRuntime
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.transformers import Transformers
from benchmarks.peers.vllm import Vllm

__all__ = ["BENCH", "PEERS", "LlamaCpp", "Model", "Peer", "Unsupported", "peers_for"]

PEERS: dict[str, Callable[[], Peer]] = {
    "llamacpp": LlamaCpp,
    "openvino-int4": lambda: OpenVino("int4"),
    "openvino-int8": lambda: OpenVino("int8"),
    "openvino-gguf": lambda: OpenVino("gguf"),
    "vllm": Vllm,
    "onnxruntime": OnnxRuntime,
    "transformers": Transformers,
}
"""By the name on the command line."""


def peers_for(name: str, bits: int) -> Peer:
    """The peer of that name; ``openvino`` is the one with as many bits as Galley's file has."""
    return PEERS[f"openvino-int{bits}" if name == "openvino" else name]()
