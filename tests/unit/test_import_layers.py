"""A file imports only from its own layer or one before it; the pure core imports no numpy (DESIGN §2)."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

LAYERS: list[tuple[str, ...]] = [
    ("galley.usage", "galley.routed", "galley.wants", "galley.types", "galley.errors"),
    ("galley.values", "galley.setting", "galley.machine", "galley.settings", "galley.config"),
    (
        "galley.kv",
        "galley.model",
        "galley.runtime.plan",
        "galley.runtime.out",
        "galley.runtime.guide",
        "galley.runtime.reading",
        "galley.runtime.residency",
        "galley.runtime.arrival",
        "galley.runtime.job",
        "galley.runtime.queue",
        "galley.runtime.policy",
        "galley.runtime.admission",
        "galley.runtime.deadlines",
        "galley.runtime.fairness",
        "galley.runtime.gate",
        "galley.runtime.journal",
        "galley.runtime.intake",
        "galley.runtime.preemption",
        "galley.runtime.rate",
        "galley.runtime.integrity",
        "galley.runtime.meter",
        "galley.runtime.stats",
        "galley.runtime.scheduler",
        "galley.runtime.park",
        "galley.runtime.memory",
        "galley.runtime.cost",
        "galley.runtime.processors",
        "galley.runtime.sampling",
        "galley.runtime.text",
    ),
    ("galley.runtime.backend", "galley._native"),
    ("galley.speculative",),
    ("galley.runtime",),  # loop, engine, mailbox: whatever is not named above
    ("galley.economics", "galley.audit"),
    ("galley.providers",),
    ("galley.router",),
    ("galley.evals",),  # training and measuring routers; serving a trained one does not reach it
    ("galley.results",),
    ("galley.offline",),
    ("galley.llm",),
    ("galley.endpoint",),
    ("galley.bench",),
    ("galley.cli",),
]

PURE = (
    "galley.kv",
    "galley.runtime.scheduler",
    "galley.runtime.plan",
    "galley.runtime.job",
    "galley.runtime.reading",
    "galley.runtime.residency",
    "galley.runtime.queue",
    "galley.runtime.policy",
    "galley.runtime.fairness",
    "galley.runtime.gate",
    "galley.runtime.journal",
    "galley.runtime.intake",
    "galley.runtime.preemption",
    "galley.runtime.rate",
    "galley.runtime.cost",
    "galley.runtime.processors",
    "galley.runtime.sampling.params",
    "galley.economics",
    "galley.audit",
    "galley.router",
)
"""These import neither numpy nor torch, and nothing of Galley that does."""

NOWHERE = {"torch", "pydantic", "fastapi", "requests", "openai"}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted((SOURCE / "galley").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


MODULES = modules()


def layer(name: str) -> int:
    """Index of the layer; the longest prefix decides."""
    best = max(
        (
            (len(prefix), index)
            for index, prefixes in enumerate(LAYERS)
            for prefix in prefixes
            if name == prefix or name.startswith(prefix + ".")
        ),
        default=None,
    )
    assert best is not None, f"{name} is in no layer: add it to LAYERS"
    return best[1]


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(tree: ast.AST, *, typing_too: bool, functions_too: bool) -> set[str]:
    """Names imported. Those of a ``TYPE_CHECKING`` block or inside a function only where asked for."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if _typing_only(node) and not typing_too:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not functions_too:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            base = node.module or ""
            # ``from galley.audit import receipts`` imports a module, not a name.
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
        else:
            found |= imports(node, typing_too=typing_too, functions_too=functions_too)
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if name != "galley"])
def test_imports_only_from_layers_before(name: str) -> None:
    above = {
        target
        for target in imports(MODULES[name], typing_too=True, functions_too=True)
        if target.startswith("galley.") and layer(target) > layer(name)
    }
    assert not above, f"{name} (layer {layer(name)}) imports from above: {sorted(above)}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(PURE)])
def test_pure_core_reaches_no_numpy(name: str) -> None:
    seen: set[str] = set()
    waiting = {name}
    while waiting:
        current = waiting.pop()
        seen.add(current)
        for target in imports(MODULES[current], typing_too=False, functions_too=False):
            root = target.partition(".")[0]
            assert root not in {"numpy", "torch"}, f"{name} reaches {root} through {current}"
            if target in MODULES and target not in seen:
                waiting.add(target)


PROJECT = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = [re.split(r"[<>=!~;\[ ]", line, maxsplit=1)[0] for line in PROJECT["dependencies"]]
OPTIONAL = {"cryptography", "huggingface_hub", "llguidance", "tqdm"}
"""Imported lazily, with an error that tells what to install."""


def test_at_most_ten_dependencies_and_no_torch() -> None:
    assert len(DEPENDENCIES) == len(set(DEPENDENCIES)) <= 10
    assert not NOWHERE & set(DEPENDENCIES)


@pytest.mark.parametrize("name", list(MODULES))
def test_imports_only_what_is_declared(name: str) -> None:
    roots = {
        target.partition(".")[0] for target in imports(MODULES[name], typing_too=True, functions_too=True)
    }
    allowed = {"galley", *DEPENDENCIES, *OPTIONAL, *sys.stdlib_module_names}
    allowed |= {"sklearn", "scipy"} if name.startswith("galley.evals") else set()
    allowed |= {"genai_prices"} if name == "galley.economics.packaged" else set()
    assert not roots - allowed and not roots & NOWHERE, f"{name}: {sorted(roots - allowed)}"


def test_only_config_reads_the_environment() -> None:
    readers = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    }
    assert readers == {"galley.config"}


@pytest.mark.parametrize("path", sorted((SOURCE / "galley").rglob("*.py")), ids=lambda path: path.name)
def test_no_file_is_longer_than_one_can_keep_in_mind(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{path.relative_to(SOURCE)} has {lines} lines: split it by its nouns"
