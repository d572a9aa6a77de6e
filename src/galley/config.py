"""One reader of settings: flag > environment > file > default; every value knows its origin.

The only module of Galley that reads the environment. Everything below it takes the values it uses.
"""

import difflib
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from galley import values
from galley.errors import ConfigError
from galley.machine import Economics, Machine
from galley.settings import SETTINGS, home_folder


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """Where and for whom the endpoint listens."""

    host: str
    port: int
    api_key: str | None
    allowed_hosts: tuple[str, ...]
    """Host headers accepted besides the bound address (against DNS rebinding)."""
    max_body: int
    """Bytes."""
    body_timeout: int
    """Seconds."""
    request_timeout: int | None
    """Seconds from arrival to the last token."""
    cors_origins: tuple[str, ...]
    """Web pages that may call."""
    admin_key: str | None
    """Key of the admin routes; without one there are none."""
    models: tuple[str, ...]
    """Models served besides the first one; each is opened when somebody asks for it."""
    model_memory: int | None
    """Bytes that awake models may take together; None is no limit."""
    idle_s: float
    """Seconds without a request after which a model falls asleep; 0 never."""
    compat: str
    """``none``, or ``ollama``: its paths are answered too."""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the runtime uses the machine. None means: measured or chosen at start, and said so."""

    backend: str
    """``auto``, ``native`` or ``reference``."""
    isa: str | None
    kv_type: str
    """``f16`` or ``int8``."""
    threads: int | None
    token_budget: int
    max_jobs: int
    max_queue: int
    kv_memory: int | None
    """Bytes for the KV arena."""
    context: int | None
    """Tokens; None is the model's own."""
    max_wait_s: float
    """Expected seconds in the queue beyond which a request is refused at once; 0 refuses none for it."""
    tenant_weights: tuple[tuple[str, float], ...]
    """Shares of tenants relative to the others', whose weight is 1."""
    journal: Path | None
    """Where the scheduler's journal is written; None writes none."""
    lora: tuple[tuple[str, Path], ...]
    """LoRA adapters served beside the first model, by name."""
    lora_dirs: tuple[Path, ...]
    """Folders from which adapters may be loaded while serving."""
    max_loras: int
    max_lora_rank: int


class KV(msgspec.Struct, frozen=True, kw_only=True):
    """The disk tier of the prefix cache."""

    disk_path: Path
    disk_bytes: int
    """Most bytes on disk, all models together; 0 is no disk tier."""


class StateSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the server keeps between requests."""

    store_responses: bool
    """Whether a response is stored when its request does not say."""
    keep_days: int
    keep_bytes: int
    max_file: int
    """Bytes of an upload."""
    batch_lines: int
    """Lines of batches under way at once."""


class Receipts(msgspec.Struct, frozen=True, kw_only=True):
    """The SQLite file of receipts, and whether prompts and outputs may be stored in it."""

    capture: bool
    path: Path


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """The tamper-evident log of requests."""

    mode: str
    """``off``; ``on``: entries follow within moments; ``strict``: no log, no tokens."""
    folder: Path
    signing_key: Path
    """The log's private key. It does not belong where the log is readable to others."""
    origin: str | None
    """Name of the log, fixed when its key is made; None makes one at random."""
    checkpoint_s: float
    """Seconds between signed checkpoints while there is something new."""


class Approving(msgspec.Struct, frozen=True, kw_only=True):
    """What waits for somebody's approval."""

    tools: tuple[tuple[str, str], ...]
    """Patterns of tool names, each with its tier."""
    above_usd: int | None
    """Pico-dollars; a request that may cost more waits."""
    ttl_s: float


class Redaction(msgspec.Struct, frozen=True, kw_only=True):
    """What is taken out of text before it is stored."""

    stores: tuple[str, ...]
    """``receipts``, ``responses``."""
    kinds: tuple[str, ...]


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """Which models and providers there are besides the model served, and the policy among them."""

    catalog: Path | None
    """TOML; None is the local model alone."""


class LedgerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where money is entered, and what local models cost."""

    enabled: bool
    url: str | None
    """None is ``ledger.db`` in the home."""
    strict: bool
    local_price: str | None
    """``input=…,output=…`` in USD per million tokens; None is nothing."""


class Pull(msgspec.Struct, frozen=True, kw_only=True):
    """How ``galley pull`` reaches a model hub. None leaves it to the hub's own client."""

    hf_endpoint: str | None
    hf_token: str | None


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting, resolved. Immutable."""

    home: Path
    model: str
    server: Server
    engine: EngineSettings
    kv: KV
    state: StateSettings
    receipts: Receipts
    audit: Audit
    ledger: LedgerSettings
    economics: Economics
    approvals: Approving
    redact: Redaction
    router: Routing
    pull: Pull
    file: Path | None
    """The TOML file that was read, or None when there is none."""
    origins: dict[str, str]
    warnings: tuple[str, ...] = ()
    """Environment names that look like ours and are not."""

    def origin(self, key: str) -> str:
        """``default``, ``file:PATH``, ``env:NAME`` or ``flag:--NAME``. Raises ConfigError if unknown."""
        if key not in self.origins:
            raise ConfigError(f"Unknown setting {key!r}.{_nearest(key, list(SETTINGS))}")
        return self.origins[key]

    def value(self, key: str) -> Any:
        """The value of a dotted key, e.g. ``server.port``. Raises ConfigError for an unknown key."""
        self.origin(key)
        found: Any = self
        for part in key.split("."):
            found = getattr(found, part)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """``{key, value, origin}`` of every setting, in table order, JSON-safe; secrets are not shown."""
        rows: list[dict[str, Any]] = []
        for key, setting in SETTINGS.items():
            value = self.value(key)
            if setting.secret and value is not None:
                value = "(set)"
            elif isinstance(value, Path):
                value = str(value)
            elif isinstance(value, tuple):
                value = list(value)
            rows.append({"key": key, "value": value, "origin": self.origins[key]})
        return rows


_NOT_SETTINGS = {"GALLEY_CONFIG", "GALLEY_PURE", "GALLEY_REQUIRE_MODEL"}
"""Names that are not settings: where the file is, a build switch, a test switch."""


def load(
    flags: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None, file: Path | None = None
) -> Config:
    """Resolve every setting.

    Args:
        flags: values given on the command line or in code, by dotted key (``server.port``) or by flag name
            (``port``, ``kv_memory``). None values count as not given.
        env: the environment; default: the process's.
        file: the TOML file (``--config``); default: ``$GALLEY_CONFIG``, else ``config.toml`` in home when it
            exists. A file that was named must exist.

    Raises ConfigError naming the origin, and the nearest key for an unknown one.
    """
    env = os.environ if env is None else env
    given: dict[str, tuple[Any, str]] = {}
    for name, value in _flags(flags or {}).items():
        given[name] = (value, f"flag:{SETTINGS[name].flag}")
    for setting in SETTINGS.values():
        # An empty variable is unset: shells and unit files cannot unset what they inherit.
        if setting.key not in given and env.get(setting.env, "") != "":
            given[setting.key] = (env[setting.env], f"env:{setting.env}")
    named = file or (Path(env["GALLEY_CONFIG"]) if env.get("GALLEY_CONFIG") else None)
    home = _parse("home", *given["home"]) if "home" in given else home_folder(env)
    path = (named or home / "config.toml").expanduser()
    if named is None and not _is_file(path):
        path = None
    if path is not None:
        for key, value in _read(path).items():
            if value == "" and SETTINGS[key].default is None:
                continue  # as an empty variable, and as the file that `config init` writes
            given.setdefault(key, (value, f"file:{path}"))

    resolved = {key: setting.default for key, setting in SETTINGS.items()}
    origins = dict.fromkeys(SETTINGS, "default")
    for key, (value, origin) in given.items():
        resolved[key] = _parse(key, value, origin)
        origins[key] = origin
    resolved["home"] = resolved["home"] or home
    resolved["receipts.path"] = resolved["receipts.path"] or resolved["home"] / "receipts.db"
    resolved["audit.folder"] = resolved["audit.folder"] or resolved["home"] / "audit"
    resolved["audit.signing_key"] = resolved["audit.signing_key"] or resolved["home"] / "audit.key"
    resolved["kv.disk_path"] = resolved["kv.disk_path"] or resolved["home"] / "kv"
    return Config(
        home=resolved["home"],
        model=resolved["model"],
        server=Server(**_section(resolved, "server")),
        engine=EngineSettings(**_section(resolved, "engine")),
        kv=KV(**_section(resolved, "kv")),
        state=StateSettings(**_section(resolved, "state")),
        receipts=Receipts(**_section(resolved, "receipts")),
        audit=Audit(**_section(resolved, "audit")),
        ledger=LedgerSettings(**_section(resolved, "ledger")),
        economics=Economics(machine=Machine(**_section(resolved, "economics.machine"))),
        approvals=Approving(**_section(resolved, "approvals")),
        redact=Redaction(**_section(resolved, "redact")),
        router=Routing(**_section(resolved, "router")),
        pull=Pull(**_section(resolved, "pull")),
        file=path,
        origins=origins,
        warnings=_strangers(env),
    )


def secret(name: str) -> str | None:
    """An API key from the environment, by the name a catalog gives; None when unset or empty."""
    return os.environ.get(name) or None


def colour_wanted(env: Mapping[str, str] | None = None) -> bool:
    """False when ``NO_COLOR`` is set to anything (no-color.org) or the terminal is dumb."""
    env = os.environ if env is None else env
    return not env.get("NO_COLOR") and env.get("TERM") != "dumb"


def template() -> str:
    """A commented TOML file with every setting at its default, as ``galley config init`` writes it."""
    lines = ["# Galley settings. A flag wins over the environment, which wins over this file.", ""]
    section = ""
    for key, setting in SETTINGS.items():
        if not setting.in_file:
            continue
        head, _, name = key.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{head}]"]
        default = setting.default
        if default is None:
            shown = '""'
        elif isinstance(default, bool):
            shown = str(default).lower()
        elif isinstance(default, tuple):
            shown = "[]"
        else:
            shown = f'"{default}"' if isinstance(default, str) else str(default)
        lines.append(f"# {setting.help} (environment: {setting.env})")
        lines.append(f"# {name} = {shown}")
    return "\n".join(lines) + "\n"


def _flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    by_name = {setting.flag[2:].replace("-", "_"): key for key, setting in SETTINGS.items()}
    found: dict[str, Any] = {}
    for name, value in flags.items():
        key = name if name in SETTINGS else by_name.get(name.replace("-", "_"))
        if key is None:
            raise ConfigError(f"flag: unknown setting {name!r}.{_nearest(name, [*SETTINGS, *by_name])}")
        if value is not None:
            found[key] = value
    return found


def _is_file(path: Path) -> bool:
    """Whether there is such a file. Raises ConfigError where that cannot be told."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        hint = "it may be another user's home: set GALLEY_HOME (--home)"
        raise ConfigError(f"file:{path}: cannot be read: {error.strerror}", hint=hint) from error


def _read(path: Path) -> dict[str, Any]:
    """The file's settings by dotted key. Raises ConfigError: unreadable, not TOML, unknown key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"file:{path}: no such file", hint=f"galley --config {path} config init") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"file:{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"file:{path}: not TOML: {error}") from error
    flat = values.flat(table, SETTINGS)
    for key in flat:
        if key not in SETTINGS or not SETTINGS[key].in_file:
            known = [name for name, setting in SETTINGS.items() if setting.in_file]
            instead = f" Set it as {SETTINGS[key].env} instead." if key in SETTINGS else _nearest(key, known)
            raise ConfigError(f"file:{path}: unknown setting {key!r}.{instead}")
    return flat


def _parse(key: str, value: Any, origin: str) -> Any:
    try:
        return SETTINGS[key].parse(value)
    except ValueError as error:
        shown = "(hidden)" if SETTINGS[key].secret else repr(value)
        raise ConfigError(f"{origin}: {key} = {shown}: {error}", param=key) from error


def _section(resolved: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key[len(name) + 1 :]: value for key, value in resolved.items() if key.startswith(name + ".")}


def _strangers(env: Mapping[str, str]) -> tuple[str, ...]:
    """A misspelt GALLEY_ name must not pass unseen; orchestrators inject two prefixes of their own."""
    known = {setting.env for setting in SETTINGS.values()} | _NOT_SETTINGS
    names = [
        name
        for name in env
        if name.startswith("GALLEY_")
        and name not in known
        and not name.startswith(("GALLEY_PORT_", "GALLEY_SERVICE_"))
    ]
    return tuple(
        f"env:{name}: not a setting of Galley.{_nearest(name, sorted(known))}" for name in sorted(names)
    )


def _nearest(name: str, known: list[str]) -> str:
    tails = {key.rpartition(".")[2]: key for key in known}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        tail = difflib.get_close_matches(name.rpartition(".")[2], list(tails), n=1, cutoff=0.6)
        close = [tails[tail[0]]] if tail else []
    return f" Did you mean {close[0]!r}?" if close else ""
