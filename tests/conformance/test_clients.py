"""Unmodified clients in environments of their own, each through one scripted session.

``make conformance`` makes the environments; without them these tests are skipped and say so.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from galley.audit.receipts import ReceiptStore
from galley.endpoint.app import build_app
from galley.endpoint.ollama.routes import ollama_routes
from galley.endpoint.params import CHANGES_ANSWER
from galley.endpoint.state import State
from galley.errors import GalleyError
from galley.model.model import Model
from galley.providers.base import Meter, Prepared, Provider
from galley.providers.local import LocalProvider
from galley.router.router import Router
from galley.runtime.backend import open_backend
from galley.runtime.engine import Engine
from galley.types import Delta, ToolCallDelta
from tests.conformance.test_openai_structure import HERMES
from tests.e2e.served import Served
from tests.tiny import tiny_gguf
from tests.unit.endpoint.fake import FakeProvider, FakeRun

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = Path(os.environ.get("CONFORMANCE_PYTHON") or ROOT / ".venv-conformance/bin/python")
LITELLM = Path(os.environ.get("CONFORMANCE_LITELLM") or ROOT / ".venv-litellm/bin/python")
MODULES = Path(os.environ.get("CONFORMANCE_NODE") or HERE / "node/node_modules")
KEY = "sk-test"
SCRIPTS = sorted(path.name for path in (HERE / "clients").glob("*.py") if path.name != "common.py")
NODE_SCRIPTS = sorted(path.name for path in (HERE / "node").glob("*.mjs"))
PACKAGES = {
    "anthropic_python.py": "anthropic",
    "langchain.py": "langchain_openai",
    "litellm_sdk.py": "litellm",
    "llm_cli.py": "llm",
    "ollama_python.py": "ollama",
    "openai_agents.py": "agents",
    "openai_python.py": "openai",
    "pydantic_ai_sdk.py": "pydantic_ai",
}

TOOLISH = (
    Delta(index=0, reasoning="Hm.", token_ids=[1]),
    Delta(index=0, text="Looking", token_ids=[2]),
    Delta(
        index=0,
        tool_calls=[ToolCallDelta(index=0, id="call_a", name="f", arguments='{"x":1}')],
        token_ids=[3],
        finish="tool_calls",
    ),
)


class OnceProvider(FakeProvider):
    """Calls its tool, and talks once it has the result: what an agent's loop needs to come to an end."""

    async def start(self, prepared: Prepared, meter: Meter) -> FakeRun:
        answered = any(message["role"] == "tool" for message in prepared.request.messages or ())
        self.script = () if answered else TOOLISH
        return await super().start(prepared, meter)


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    """A real engine over a tiny random model, for what only grammars can enforce."""
    pytest.importorskip("llguidance")
    path = tiny_gguf(tmp_path_factory.mktemp("tiny") / "m.gguf", vocab=420, context=2048, template=HERMES)
    with contextlib.closing(Model.open(path, "tiny")) as model:
        backend = open_backend("auto", model.gguf, model.spec, threads=1, num_blocks=512).backend
        engine = Engine(backend, eos_ids=model.tokenizer.eos_ids)
        engine.start()
        yield LocalProvider(model, engine)
        engine.close()
        backend.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, shaped: Provider) -> Iterator[str]:
    """A server with models for every situation."""
    path = tmp_path_factory.mktemp("clients")
    store = ReceiptStore(path / "receipts.db", batch_s=0.001)
    providers = [
        FakeProvider(context=4000),
        FakeProvider(name="busy", full=True),
        FakeProvider(name="broken", fault=GalleyError("for good")),
        FakeProvider(name="slow", words=("x",) * 1000, step_s=0.02, context=4000),
        FakeProvider(name="toolish", script=TOOLISH, context=4000),
        OnceProvider(name="toolish-once", script=TOOLISH, words=("The tool ", "said so"), context=4000),
        shaped,
    ]
    state = State(path / "home")
    shim = ollama_routes(lambda name: None, None)
    app = build_app(Router(providers, store), store, state=state, keys=[KEY], ollama=shim)
    with Served(app) as served:
        loop = served.loop
        loop.call_soon_threadsafe(state.start)
        yield served.url
        asyncio.run_coroutine_threadsafe(state.stop(), loop).result(10)
    store.close()


def tidy(home: Path) -> dict[str, str]:
    """An environment without keys, proxies or settings of the user's."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return kept | {"HOME": str(home), "PYTHONPATH": str(HERE / "clients"), "NO_PROXY": "*"}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_python_client(url: str, script: str, tmp_path: Path) -> None:
    python = LITELLM if script == "litellm_sdk.py" else PYTHON
    probe = [str(python), "-c", f"import importlib.util as u; assert u.find_spec({PACKAGES[script]!r})"]
    if not python.exists() or subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip(f"{PACKAGES[script]} is not in {python.parent}; `make conformance` puts it there")
    tools = [] if "tools" in CHANGES_ANSWER else ["tools"]
    command = [str(python), str(HERE / "clients" / script), url, KEY, *tools]
    run(command, tidy(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("script", NODE_SCRIPTS)
def test_node_client(url: str, script: str, tmp_path: Path) -> None:
    if not MODULES.exists() or shutil.which("node") is None:
        pytest.skip(f"no node, or no packages in {MODULES}; `make conformance` installs them")
    # Modules are looked for beside the script.
    (tmp_path / "node_modules").symlink_to(MODULES)
    shutil.copy(HERE / "node" / script, tmp_path / script)
    run(["node", str(tmp_path / script), url, KEY], tidy(tmp_path))


def run(command: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
