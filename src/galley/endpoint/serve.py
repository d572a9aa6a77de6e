"""``galley serve``: the socket, the loading, the signals, and the way out."""

import asyncio
import gc
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine

import msgspec
import uvicorn
import uvloop

from galley import __version__
from galley.audit.feedback import FeedbackStore
from galley.audit.pii import Redactor
from galley.audit.receipts import ReceiptStore
from galley.audit.scribe import Scribe
from galley.audit.warden import Warden
from galley.config import Config, secret
from galley.economics.ledger import Ledger
from galley.economics.price import own_price
from galley.endpoint.access import check_bind
from galley.endpoint.admin import Admin
from galley.endpoint.app import build_app
from galley.endpoint.feedback import FeedbackPage
from galley.endpoint.keys import KeyStore
from galley.endpoint.listener import bind
from galley.endpoint.ollama.facts import FactsBook
from galley.endpoint.ollama.routes import ollama_routes
from galley.endpoint.opening import open_entry
from galley.endpoint.protocol import Listener, Protocol
from galley.endpoint.state import Keeping, State
from galley.errors import ConfigError, GalleyError, Overloaded
from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.model.model import Model
from galley.model.store import Entry, Store
from galley.providers.adapters import Adapters
from galley.providers.base import ModelCard
from galley.providers.fit import plan_fit
from galley.providers.fleet import Fleet
from galley.providers.opened import Opened, options_of
from galley.providers.remote import RemoteProvider
from galley.providers.resident import Resident
from galley.router.catalog import Catalog
from galley.router.outside import open_providers, stamp
from galley.router.router import Router

__all__ = ["Server", "serve"]

DRAIN_S = 30.0
"""How long running answers may go on after SIGTERM."""
LINGER_S = 5.0
"""How long the last bytes may take to reach a client after that; then its connection is cut."""
NO_MODEL = "none"
"""The model that stands for no engine here, only other servers."""
SWITCH_S = 0.0005
WATCH_S = 1.0
"""How often the catalog's file and the failed upstreams are looked at."""


def say(line: str) -> None:
    """One plain line on stderr."""
    sys.stderr.write(f"galley: {line}\n")
    sys.stderr.flush()


def serve(config: Config) -> None:
    """Serve ``config.model`` until SIGTERM or Ctrl-C, then finish what runs and return (exit code 0). The
    model ``none`` is no engine: only the catalog's providers are served.

    The socket answers at once (``/health`` 200, ``/ready`` 503) while the model loads in a thread.

    Raises ConfigError (unsafe bind, address in use), ModelNotFound, BadModelFile.
    """
    keys = KeyStore(config.home / "keys.db")
    check_bind(config.server.host, config.server.api_key, keys)
    keys.close()
    if config.model == NO_MODEL:
        # The receipts' thread and the loop's share the interpreter: a request waits half a millisecond
        # for its turn instead of five. Engines have threads of their own, so there it stays as it is.
        sys.setswitchinterval(SWITCH_S)
        server = Server(config, None, None)
    else:
        entry = Store(config.home).resolve(config.model)
        server = Server(config, entry, lambda: open_entry(config, entry, None))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.run())


class Server:
    """One serving process.

    Args:
        entry, open_model: the model served from the start, and what makes it run, called in a thread; None
            for both serves the catalog's providers alone.
        drain_s: how long running answers may go on after the signal.
    """

    def __init__(
        self,
        config: Config,
        entry: Entry | None,
        open_model: Callable[[], Opened] | None,
        *,
        drain_s: float = DRAIN_S,
    ) -> None:
        self.config = config
        self._open_model = open_model
        self._drain_s = drain_s
        self._began = time.monotonic()
        clean = Redactor.of(config.redact.stores, config.redact.kinds)
        self.receipts = ReceiptStore(config.receipts.path, clean=clean["receipts"].receipt)
        self._entry = entry
        self._store = Store(config.home)
        self.fleet = Fleet(
            budget=config.server.model_memory,
            idle_s=config.server.idle_s or None,
            sizes=self._size_of,
        )
        aliases: dict[str, str] = {}
        if entry is not None:
            aliases = {name: entry.name for name in (config.model, *entry.aliases) if name != entry.name}
        self._aliases = aliases
        self._own = own_price(config.ledger.local_price)
        catalog = self._read_catalog()
        kept = config.ledger
        self.ledger = Ledger.at(config.home, kept.url, strict=kept.strict) if kept.enabled else None
        self._outside: list[RemoteProvider] = []
        self.scribe = Scribe.opened(self.receipts, **msgspec.structs.asdict(config.audit))
        known = catalog or Catalog(self._aliases, own=self._own)
        self.warden = Warden.opened(config.home / "approvals.db", **msgspec.structs.asdict(config.approvals))
        self.router = Router(
            [], self.receipts, catalog=known, ledger=self.ledger, auditor=self.scribe, warden=self.warden
        )
        if catalog is not None:
            self._outside = open_providers(catalog, secret)
        if entry is None and not self._outside:
            raise ConfigError(
                "Without a model of its own this server needs providers, and no catalog names any.",
                param="router.catalog",
                hint="docs/ROUTING.md, The catalog",
            )
        keeping = config.state
        self.state = State(
            config.home,
            Keeping(
                store=keeping.store_responses,
                days=keeping.keep_days,
                bytes=keeping.keep_bytes,
                max_file=keeping.max_file,
                concurrency=keeping.batch_lines,
            ),
            clean=clean["responses"].value,
        )
        self._feedback = FeedbackPage(self.router, self.receipts, FeedbackStore(config.home / "feedback.db"))
        app = build_app(
            self.router,
            self.receipts,
            feedback=self._feedback,
            host=config.server.host,
            keys=[config.server.api_key] if config.server.api_key else [],
            allowed_hosts=config.server.allowed_hosts,
            cors_origins=config.server.cors_origins,
            max_body=config.server.max_body,
            body_s=config.server.body_timeout,
            total_s=config.server.request_timeout,
            capture=config.receipts.capture,
            state=self.state,
            admin=Admin(
                self.fleet,
                key=config.server.admin_key,
                load=self._add,
                unload=self._remove,
                router=self.router,
                approvals=self.warden.queue,
                max_body=config.server.max_body,
            ),
            ollama=ollama_routes(FactsBook(self._store), self.fleet)
            if config.server.compat == "ollama"
            else None,
        )
        self._listener = Listener(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
            )
        )
        self._signals = 0
        self._failure: Exception | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    def _read_catalog(self) -> Catalog | None:
        path = self.config.router.catalog
        return None if path is None else Catalog.read(path, self._aliases, own=self._own)

    @property
    def port(self) -> int:
        """The port bound, once ``run`` has begun."""
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        host = self.config.server.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def run(self) -> None:
        """Serve until told to stop. Raises what loading the model raised."""
        self._socket = bind(self.config.server.host, self.config.server.port)
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
        self.receipts.replay()
        if self.ledger is not None:
            self.ledger.start()
        say(f"{__version__} listening on {self.url}; loading {self.config.model} …")
        loading = asyncio.ensure_future(self._load())
        self.state.start()
        watching = [asyncio.ensure_future(self._watch()), asyncio.ensure_future(self.fleet.watch())]
        try:
            await self._listener.serve(sockets=[self._socket])
        finally:
            for task in watching:
                task.cancel()
            await loading
            await self.state.stop()
            await self._listener.settle(LINGER_S)
            for provider in self._outside:
                provider.close()
            await self.fleet.close()
            self.warden.queue.close()
            if self.scribe is not None:
                await asyncio.to_thread(self.scribe.close)
            self.receipts.close()
            if self.ledger is not None:
                await asyncio.to_thread(self.ledger.close)
        if self._failure is not None:
            raise self._failure
        faults = [self.receipts.fault, self.scribe.fault if self.scribe else None, self.router.active]
        say("stopped, with faults" if any(faults) else "stopped; every receipt is written")

    async def _load(self) -> None:
        try:
            if self._open_model is None or self._entry is None:
                self._open_doors(None)
                return
            opened = await asyncio.to_thread(self._open_model)
            for note in opened.notes:
                say(note)
            self._open_doors(
                Resident(opened.provider.cards[0], self._opener(self._entry), self.fleet, opened=opened)
            )
        except Exception as error:  # the listener must stop first, then the caller gets it
            self._failure = error
            self.router.fail(str(error))
            self._leave(self._close())

    def _open_doors(self, first: Resident | None) -> None:
        """Take requests, unless a signal came first. Raises what a wrong catalog or model name raises."""
        if first is not None:
            self.fleet.add(first)
        if self.router.state != "loading":
            return
        for provider in self._outside:
            self.router.catalog.add(provider)
        if first is not None:
            self.router.catalog.add(first)
        for name in self.config.server.models:
            self._add(name)
        self.router.add(self._outside[0] if first is None else first)
        if self.state.runner is not None:
            self.state.runner.wake()
        gc.collect()
        gc.freeze()  # what is here now stays: collections need not look at it again
        spent = time.monotonic() - self._began
        say(f"ready after {spent:.2f} s at {self.url}/v1; receipts in {self.config.receipts.path}")
        if self.scribe is not None:
            say(f"audit log: {self.scribe.log.size} entries in {self.scribe.log.folder}")

    def _opener(self, entry: Entry) -> Callable[[Model | None, Adapters | None], Opened]:
        def opener(kept: Model | None, had: Adapters | None) -> Opened:
            opened = open_entry(self.config, entry, kept, had)
            try:
                self.router.catalog.check_weights(entry.name, opened.provider.digests.weights)
            except ConfigError:
                opened.close()
                raise
            return opened

        return opener

    def _add(self, name: str) -> Resident:
        """Serve one more model, asleep until somebody asks. Raises ModelNotFound, BadModelFile."""
        entry = self._store.resolve(name)
        with GGUF.open(entry.path) as gguf:
            spec = spec_from_gguf(gguf)
        context = min(spec.context, self.config.engine.context or spec.context)
        card = ModelCard(
            id=entry.name,
            context=context,
            created=int(time.time()),
            served_by=f"local:{entry.name}@cpu",
        )
        resident = Resident(card, self._opener(entry), self.fleet)
        self.fleet.add(resident)
        self.router.add(resident)
        return resident

    async def _remove(self, name: str) -> None:
        """Serve a model no more: nothing new is let in, what is in hand ends first."""
        resident = self.fleet.find(name)
        self.router.catalog.remove(resident)
        if not await resident.sleep(2):
            self.router.catalog.add(resident)
            raise Overloaded(f"{name!r} is busy.", code="model_busy", retry_after_s=5.0)
        self.fleet.remove(name)

    def _size_of(self, name: str) -> int:
        """Bytes that a model will take: its file, and the KV cache by the memory plan."""
        fit = plan_fit(self._store.resolve(name), options_of(self.config), available=None)
        return fit.total_bytes

    async def _watch(self) -> None:
        """Once a second: probe upstreams whose breaker is due, and take up a changed catalog. A catalog that
        is wrong changes nothing and is told once."""
        path = self.config.router.catalog
        if path is None:
            return
        seen = stamp(path)
        while True:
            await asyncio.sleep(WATCH_S)
            await self.router.probe()
            await self._feedback.keep_up(say)
            now = stamp(path)
            if now == seen or self.router.state != "ready" or now is None:
                continue
            seen = now
            try:
                catalog = Catalog.read(path, self._aliases, own=self._own)
                outside = open_providers(catalog, secret)
                self.router.reload(catalog, [*outside, *self.fleet.residents()])
            except GalleyError as error:
                say(f"the changed catalog is not taken: {error.message}")
                continue
            # Answers under way keep their connections; only idle ones close.
            for provider in self._outside:
                provider.close()
            self._outside = outside
            say(f"catalog reloaded: {len(catalog.models)} models, {len(catalog.tables)} providers")

    def stop(self) -> None:
        """First call: refuse new requests, let running ones finish. Second: stop now."""
        self._signals += 1
        if self._signals > 1:
            say("stopping now; running answers are cancelled")
            self._leave(self._abort())
        else:
            self._leave(self._drain())

    def _leave(self, work: Coroutine[None, None, None]) -> None:
        # Kept until done: a task that nobody refers to may be collected.
        task = asyncio.ensure_future(work)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _drain(self) -> None:
        self.router.drain()
        if self.router.active:
            say(f"stopping: waiting up to {self._drain_s:.0f} s for {self.router.active} running requests")
        end = time.monotonic() + self._drain_s
        while self.router.active and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self.router.active:
            say(f"{self.router.active} answers did not end in time; they are cancelled")
            await self.router.abort()
        await self._close()

    async def _abort(self) -> None:
        self.router.drain()
        await self.router.abort()
        await self._close()

    async def _close(self) -> None:
        """Let the exchanges under way end, cut those that do not, then stop listening.

        Cut before uvicorn would cancel them: a lost connection is an end that leaves a receipt.
        """
        await self._listener.settle(LINGER_S)
        self._listener.should_exit = True
