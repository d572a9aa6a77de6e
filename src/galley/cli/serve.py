"""`galley serve`: a model behind an OpenAI-compatible endpoint."""

import click

from galley.cli.session import ENGINE_FLAGS, Session, capture_option, settings_options

SERVER_FLAGS: dict[str, tuple[str, str, str]] = {
    "model": (
        "--model",
        "MODEL",
        "Model to serve: a name, an alias or a path; none serves the catalog's providers alone.",
    ),
    "server.host": ("--host", "ADDRESS", "Address to bind; beyond loopback a key is required."),
    "server.port": ("--port", "PORT", "Port to bind; 0 picks a free one. Default: 7117."),
    "server.api_key": (
        "--api-key",
        "KEY",
        "Key clients must send. Better in $GALLEY_API_KEY: flags are visible.",
    ),
    "server.allowed_hosts": (
        "--allowed-hosts",
        "NAMES",
        "Further Host headers to accept, separated by commas.",
    ),
    "server.models": ("--models", "NAMES", "Further models, opened when asked for, separated by commas."),
    "server.model_memory": (
        "--model-memory",
        "SIZE",
        "Memory that awake models may take together; the least recently used one sleeps.",
    ),
    "server.idle_s": ("--idle-s", "SECONDS", "A model nobody asks for in so long sleeps; 0: never."),
    "server.admin_key": ("--admin-key", "KEY", "Key of /v1/admin; without one there is none."),
    "server.compat": ("--compat", "NAME", "Answer another server's paths too: ollama."),
    "server.max_body": ("--max-body", "SIZE", "Largest request body, such as 8MiB."),
}

LOAD_FLAGS: dict[str, tuple[str, str, str]] = {
    "engine.max_queue": ("--max-queue", "N", "Most choices waiting."),
    "engine.max_wait_s": (
        "--max-wait-s",
        "SECONDS",
        "Refuse at once what is expected to wait longer; 0: never. Default: 60.",
    ),
    "engine.tenant_weights": (
        "--tenant-weights",
        "PAIRS",
        "Shares of the machine, such as alice=2,bob=0.5; others have 1.",
    ),
    "engine.lora": ("--lora", "PAIRS", "LoRA adapters to serve, such as poet=/adapters/poet."),
    "engine.lora_dirs": ("--lora-dirs", "DIRS", "Folders from which adapters may be loaded while serving."),
    "engine.journal": ("--journal", "FILE", "Write the scheduler's journal; it holds token ids."),
}


@click.command()
@settings_options({**SERVER_FLAGS, **ENGINE_FLAGS, **LOAD_FLAGS})
@capture_option
@click.pass_obj
def serve(session: Session) -> None:
    """Serve a model through an OpenAI-compatible endpoint.

    Runs in the foreground until Ctrl-C or SIGTERM, which let running answers finish.
    """
    config = session.config
    from galley.endpoint.serve import NO_MODEL
    from galley.endpoint.serve import serve as run_server

    # Named here, before anything is loaded: a missing model is exit code 3 at once.
    if config.model != NO_MODEL:
        session.store.resolve(config.model)

    run_server(config)
