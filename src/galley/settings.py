"""The table of settings: name, environment variable, reader, default and help of each."""

import sys
from collections.abc import Mapping
from pathlib import Path

from galley import values
from galley.machine import MACHINE
from galley.setting import Setting

__all__ = ["DEFAULT_MODEL", "SETTINGS", "Setting", "home_folder"]

DEFAULT_MODEL = "smollm2-135m"


def home_folder(env: Mapping[str, str]) -> Path:
    """The platform's data folder: XDG on Linux, Application Support on macOS, LOCALAPPDATA on Windows."""
    if sys.platform == "darwin":
        return Path("~/Library/Application Support/galley").expanduser()
    if sys.platform == "win32" and env.get("LOCALAPPDATA"):
        return Path(env["LOCALAPPDATA"]) / "galley"
    xdg = env.get("XDG_DATA_HOME", "")
    # The XDG specification asks for relative paths to be ignored.
    base = Path(xdg) if xdg and Path(xdg).is_absolute() else Path("~/.local/share").expanduser()
    return base / "galley"


SETTINGS: dict[str, Setting] = {
    row.key: row
    for row in (
        Setting("home", "GALLEY_HOME", values.path, None, "models, receipts and the default config file"),
        Setting(
            "model", "GALLEY_MODEL", values.text, DEFAULT_MODEL, "model served and used when none is named"
        ),
        Setting(
            "server.host",
            "GALLEY_HOST",
            values.text,
            "127.0.0.1",
            "address to bind; beyond loopback needs a key",
        ),
        Setting(
            "server.port", "GALLEY_PORT", values.integer(0, 65535), 7117, "port to bind; 0 picks a free one"
        ),
        Setting("server.api_key", "GALLEY_API_KEY", values.text, None, "key clients must send", secret=True),
        Setting(
            "server.allowed_hosts", "GALLEY_ALLOWED_HOSTS", values.names, (), "further Host headers to accept"
        ),
        Setting(
            "server.admin_key",
            "GALLEY_ADMIN_KEY",
            values.text,
            None,
            "key of the admin routes; without one there are none",
            secret=True,
        ),
        Setting(
            "server.models",
            "GALLEY_MODELS",
            values.names,
            (),
            "further models to serve, opened when asked for",
        ),
        Setting(
            "server.model_memory",
            "GALLEY_MODEL_MEMORY",
            values.size,
            None,
            "bytes that awake models may take together; default: no limit",
        ),
        Setting(
            "server.idle_s",
            "GALLEY_IDLE_S",
            values.seconds,
            0.0,
            "seconds without a request until a model sleeps; 0: never",
        ),
        Setting(
            "server.compat",
            "GALLEY_COMPAT",
            values.one_of("none", "ollama"),
            "none",
            "another server's paths to answer too: ollama is /api/chat, /api/generate, /api/tags …",
        ),
        Setting("server.max_body", "GALLEY_MAX_BODY", values.size, 8 << 20, "largest request body"),
        Setting(
            "server.body_timeout",
            "GALLEY_BODY_TIMEOUT",
            values.integer(1, 86_400),
            60,
            "seconds a request body may take to arrive",
        ),
        Setting(
            "server.request_timeout",
            "GALLEY_REQUEST_TIMEOUT",
            values.integer(1, 86_400),
            None,
            "seconds an answer may take; default: no limit",
        ),
        Setting(
            "server.cors_origins",
            "GALLEY_CORS_ORIGINS",
            values.names,
            (),
            "web pages that may call, such as http://localhost:3000; default: none",
        ),
        Setting(
            "state.store_responses",
            "GALLEY_STORE_RESPONSES",
            values.boolean,
            True,
            "store answers of /v1/responses unless a request says store: false",
        ),
        Setting(
            "state.keep_days",
            "GALLEY_KEEP_DAYS",
            values.integer(1, 36_500),
            30,
            "days that stored answers are kept",
        ),
        Setting(
            "state.keep_bytes",
            "GALLEY_KEEP_BYTES",
            values.size,
            1 << 30,
            "most bytes of stored answers; the oldest go first",
        ),
        Setting("state.max_file", "GALLEY_MAX_FILE", values.size, 200 << 20, "largest upload"),
        Setting(
            "state.batch_lines",
            "GALLEY_BATCH_LINES",
            values.integer(1, 1 << 16),
            16,
            "lines of batches under way at once",
        ),
        Setting(
            "engine.backend",
            "GALLEY_BACKEND",
            values.one_of("auto", "native", "reference"),
            "auto",
            "kernels to run on",
        ),
        Setting(
            "engine.isa",
            "GALLEY_ISA",
            values.text,
            None,
            "instruction set of the native backend; default: the best",
        ),
        Setting(
            "engine.kv_type",
            "GALLEY_KV_TYPE",
            values.one_of("f16", "int8"),
            "f16",
            "how the native backend keeps keys and values; int8 halves their memory",
        ),
        Setting(
            "engine.threads",
            "GALLEY_THREADS",
            values.integer(1, 1024),
            None,
            "kernel threads; default: the physical cores",
        ),
        Setting(
            "engine.token_budget",
            "GALLEY_TOKEN_BUDGET",
            values.integer(1, 1 << 20),
            512,
            "most tokens computed in a step",
        ),
        Setting(
            "engine.max_jobs",
            "GALLEY_MAX_JOBS",
            values.integer(1, 1 << 16),
            64,
            "most choices running at once",
        ),
        Setting(
            "engine.max_queue", "GALLEY_MAX_QUEUE", values.integer(0, 1 << 20), 1024, "most choices waiting"
        ),
        Setting(
            "engine.kv_memory", "GALLEY_KV_MEMORY", values.size, None, "bytes for KV; default: what fits"
        ),
        Setting(
            "engine.context", "GALLEY_CONTEXT", values.tokens, None, "context in tokens; default: the model's"
        ),
        Setting(
            "engine.max_wait_s",
            "GALLEY_MAX_WAIT_S",
            values.seconds,
            60.0,
            "expected seconds of waiting beyond which requests are refused; 0: never",
        ),
        Setting(
            "engine.tenant_weights",
            "GALLEY_TENANT_WEIGHTS",
            values.weights,
            (),
            "shares of tenants, such as alice=2,bob=0.5; others have 1",
        ),
        Setting(
            "engine.lora",
            "GALLEY_LORA",
            values.places,
            (),
            "LoRA adapters served beside the first model, such as poet=/adapters/poet",
        ),
        Setting(
            "engine.lora_dirs",
            "GALLEY_LORA_DIRS",
            values.paths,
            (),
            "folders from which /v1/load_lora_adapter may load; default: none",
        ),
        Setting(
            "engine.max_loras",
            "GALLEY_MAX_LORAS",
            values.integer(1, 1024),
            8,
            "most LoRA adapters in the engine at once; others wait their turn",
        ),
        Setting(
            "engine.max_lora_rank",
            "GALLEY_MAX_LORA_RANK",
            values.integer(1, 1024),
            64,
            "largest rank of a LoRA adapter that is loaded",
        ),
        Setting(
            "engine.journal",
            "GALLEY_JOURNAL",
            values.path,
            None,
            "file for the scheduler's journal (holds token ids); default: none",
        ),
        Setting("kv.disk_path", "GALLEY_KV_DISK_PATH", values.path, None, "KV on disk; default: HOME/kv"),
        Setting(
            "kv.disk_bytes",
            "GALLEY_KV_DISK_BYTES",
            values.budget,
            1 << 30,
            "most bytes of KV kept on disk by serve, run and chat; 0 keeps it in memory alone",
        ),
        Setting(
            "receipts.capture",
            "GALLEY_CAPTURE",
            values.boolean,
            False,
            "store prompts and outputs in receipts",
        ),
        Setting(
            "receipts.path",
            "GALLEY_RECEIPTS_PATH",
            values.path,
            None,
            "receipt database; default: HOME/receipts.db",
        ),
        Setting(
            "audit.mode",
            "GALLEY_AUDIT",
            values.one_of("off", "on", "strict"),
            "off",
            "tamper-evident log of requests; strict: no log, no tokens; needs the extra audit",
        ),
        Setting(
            "audit.folder", "GALLEY_AUDIT_FOLDER", values.path, None, "the audit log; default: HOME/audit"
        ),
        Setting(
            "audit.signing_key",
            "GALLEY_AUDIT_SIGNING_KEY",
            values.path,
            None,
            "file of the audit log's private key, made when missing; default: HOME/audit.key",
        ),
        Setting(
            "audit.origin",
            "GALLEY_AUDIT_ORIGIN",
            values.text,
            None,
            "name of the audit log, taken when its key is made, such as example.com/log; default: random",
        ),
        Setting(
            "audit.checkpoint_s",
            "GALLEY_AUDIT_CHECKPOINT_S",
            values.seconds,
            1.0,
            "seconds between signed checkpoints of the audit log",
        ),
        Setting(
            "ledger.enabled",
            "GALLEY_LEDGER",
            values.boolean,
            True,
            "enter every request in the ledger, and hold its budgets",
        ),
        Setting(
            "ledger.url",
            "GALLEY_LEDGER_URL",
            values.text,
            None,
            "database of the ledger, such as postgresql://galley@db/galley; default: HOME/ledger.db",
            secret=True,
        ),
        Setting(
            "ledger.strict",
            "GALLEY_LEDGER_STRICT",
            values.boolean,
            False,
            "refuse every request while the ledger cannot be written, not only those with limits",
        ),
        Setting(
            "ledger.local_price",
            "GALLEY_LOCAL_PRICE",
            values.text,
            None,
            "USD per million tokens of local models, such as input=0.10,output=0.40,cached=0.01; default: 0",
        ),
        *MACHINE,
        Setting(
            "approvals.tools",
            "GALLEY_APPROVALS_TOOLS",
            values.tiers,
            (),
            "tools whose calls wait for approval, such as send_*=write,delete_*=destructive",
        ),
        Setting(
            "approvals.above_usd",
            "GALLEY_APPROVALS_ABOVE_USD",
            values.dollars,
            None,
            "a request that may cost more dollars waits for approval; default: none does",
        ),
        Setting(
            "approvals.ttl_s",
            "GALLEY_APPROVALS_TTL_S",
            values.seconds,
            3600.0,
            "seconds within which an approval must be given and used",
        ),
        Setting(
            "redact.stores",
            "GALLEY_REDACT_STORES",
            values.some_of("receipts", "responses"),
            (),
            "stores that get text without personal data and secrets: receipts, responses; default: none",
        ),
        Setting(
            "redact.kinds",
            "GALLEY_REDACT_KINDS",
            values.some_of("secret", "email", "iban", "card", "national_id", "phone"),
            ("secret", "email", "iban", "card", "national_id", "phone"),
            "what is taken out of them",
        ),
        Setting(
            "router.catalog",
            "GALLEY_CATALOG",
            values.path,
            None,
            "catalog of models, providers and policy (TOML); default: the local model alone",
        ),
        Setting("pull.hf_endpoint", "HF_ENDPOINT", values.text, None, "model hub address for hf: sources"),
        Setting(
            "pull.hf_token",
            "HF_TOKEN",
            values.text,
            None,
            "model hub token for hf: sources",
            secret=True,
            in_file=False,
        ),
    )
}
