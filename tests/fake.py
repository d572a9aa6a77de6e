"""A backend whose next token is a hash of the whole visible prefix, read back through the block table.

No numerics, yet any mix-up of KV blocks, positions or lengths changes what it says: the equality tests of the
scheduler run on it in milliseconds.
"""

from hashlib import blake2b

from galley.errors import EngineFault
from galley.model.spec import ModelSpec
from galley.runtime.loop import Loop
from galley.runtime.out import StepOut
from galley.runtime.plan import Drawn, Draws, Rows
from galley.runtime.scheduler import Scheduler
from galley.types import SamplingParams


def fake_spec(vocab: int = 997, context: int = 100_000) -> ModelSpec:
    return ModelSpec(
        arch="llama", name="fake", layers=2, hidden=8, ffn=16, heads=2, kv_heads=1, head_dim=4, vocab=vocab,
        context=context, rms_eps=1e-5, rope_base=1e4, rope_dim=4, rope_interleaved=True,
    )  # fmt: skip


class FakeBackend:
    """Satisfies ``Backend``; ``fail_on`` is a set of run numbers (from 0) that raise."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 16,
        vocab: int = 997,
        context: int = 100_000,
        fail_on: frozenset[int] = frozenset(),
        error: type[Exception] = EngineFault,
    ) -> None:
        self.name, self.isa, self.threads = "fake", "none", 1
        self.spec = fake_spec(vocab, context)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.kv_bytes_per_token = 32
        self.block_bytes = 16 * block_size
        self.kv_dtype = "fake"
        self.weight_bytes = 1000
        self.fingerprint = "fake-1"
        self.runs = 0
        self.fail_on = fail_on
        self.error = error
        self.steps: list[list[tuple[int, int]]] = []
        """Per step, (context, tokens) of each sequence."""
        self.kv: list[tuple[int, int]] = [(-1, -1)] * (num_blocks * block_size)
        self.rows: list[bytes] = []

    def run(self, rows: Rows) -> None:
        run, self.runs = self.runs, self.runs + 1
        size = self.block_size
        wanted = set(rows.out)
        self.rows = []
        self.steps.append([])
        written: set[int] = set()
        for s in range(len(rows)):
            first, last = rows.seq_start[s], rows.seq_start[s + 1]
            blocks = rows.blocks[rows.block_start[s] : rows.block_start[s + 1]]
            context = rows.context[s]
            self.steps[-1].append((context, last - first))
            assert len(blocks) * size >= context + last - first, "the block table is too short"
            for i, token in enumerate(rows.tokens[first:last]):
                position = context + i
                slot = blocks[position // size] * size + position % size
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self.kv[slot] = (token, position)
                if first + i in wanted:
                    seen = [self.kv[blocks[p // size] * size + p % size] for p in range(position + 1)]
                    assert [p for _, p in seen] == list(range(position + 1)), "a KV slot of another position"
                    self.rows.append(blake2b(repr(seen).encode(), digest_size=8).digest())
        if run in self.fail_on:
            self.kv = [(-9, -9) if slot in written else value for slot, value in enumerate(self.kv)]
            raise self.error(f"run {run} fails")

    def sample(self, draws: Draws) -> Drawn:
        ids = []
        for r, row in enumerate(self.rows):
            noise = (draws.seed[r], draws.position[r], draws.lane[r]) if draws.temperature[r] >= 1e-5 else ()
            bans = set(draws.ban_ids[draws.ban_start[r] : draws.ban_start[r + 1]])
            token = (
                int.from_bytes(blake2b(row + repr(noise).encode(), digest_size=8).digest()) % self.spec.vocab
            )
            while token in bans:
                token = (token + 1) % self.spec.vocab
            ids.append(token)
        n = len(ids)
        return Drawn(ids, [-1.0] * n, [1] * n, [[] for _ in range(n)])

    def logits(self) -> list[bytes]:
        return list(self.rows)

    def read_block(self, block: int) -> bytes:
        slots = self.kv[block * self.block_size : (block + 1) * self.block_size]
        return b"".join(v.to_bytes(8, "little", signed=True) for pair in slots for v in pair)

    def write_block(self, block: int, data: bytes | memoryview) -> None:
        if len(data) != self.block_bytes:
            raise EngineFault(f"{len(data)} bytes are no block")
        words = [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)]
        start = block * self.block_size
        self.kv[start : start + self.block_size] = list(zip(words[::2], words[1::2], strict=True))

    def close(self) -> None:
        pass


class Bench:
    """A scheduler, a fake backend and a clock that ticks once a step; checks the invariants at every step."""

    tick = 1.0

    def __init__(
        self, backend: FakeBackend | None = None, *, eos: frozenset[int] = frozenset(), **limits
    ) -> None:
        self.backend = backend or FakeBackend()
        self.now = 0.0
        limits.setdefault("context", 4096)
        self.scheduler = Scheduler(
            num_blocks=self.backend.num_blocks,
            block_size=self.backend.block_size,
            vocab=self.backend.spec.vocab,
            eos=eos,
            **limits,
        )
        self.plans: list[list[tuple[str, int]]] = []
        self.outs: dict[str, list[StepOut]] = {}
        self.loop = Loop(self.scheduler, self.backend, clock=lambda: self.now)

    def add(self, job_id: str, prompt, *, lane: int = 0, options=None, **params):
        params.setdefault("temperature", 0.0)
        params.setdefault("seed", 1)
        params.setdefault("max_tokens", 8)
        return self.scheduler.submit(
            job_id, list(prompt), SamplingParams(**params), self.now, lane=lane, **(options or {})
        )

    def step(self) -> list[StepOut]:
        self.now += self.tick
        assert len(self.plans) < 20_000, "no progress"
        plan_of = self.scheduler.plan

        def spy(now):
            plan = plan_of(now)
            self.plans.append(plan.log())
            assert plan.tokens == sum(plan.rows.values()) <= self.scheduler.token_budget, "SCH-1"
            assert all(n >= 1 and job.computed + n <= len(job.tokens) for job, n in plan.rows.items()), (
                "SCH-1"
            )
            return plan

        self.scheduler.plan = spy  # type: ignore[method-assign]
        try:
            outs = self.loop.step()
        finally:
            self.scheduler.plan = plan_of  # type: ignore[method-assign]
        for out in outs:
            self.outs.setdefault(out.job_id, []).append(out)
        assert self.scheduler.check() == []
        return outs

    def run(self, limit: int = 10_000) -> None:
        while self.scheduler.busy:
            limit -= 1
            assert limit, "no progress"
            self.step()

    def ids(self, job_id: str) -> list[int]:
        return [t for out in self.outs.get(job_id, []) for t in out.token_ids]

    def last(self, job_id: str) -> StepOut:
        return self.outs[job_id][-1]


def alone(
    prompt, *, lane: int = 0, eos: frozenset[int] = frozenset(), vocab: int = 997, **params
) -> list[int]:
    """What a cold engine with nothing else to do says."""
    bench = Bench(FakeBackend(num_blocks=512, vocab=vocab), eos=eos, token_budget=100_000)
    bench.add("alone", prompt, lane=lane, **params)
    bench.run()
    return bench.ids("alone")
