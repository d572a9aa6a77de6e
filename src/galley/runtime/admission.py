"""Admission: what can never run, what does not fit now, and what had better wait a moment."""

from collections.abc import Collection, Iterable, Iterator

from galley.errors import ContextLengthExceeded, InvalidRequest
from galley.kv.tree import Node, Tree
from galley.runtime.job import Job, State
from galley.runtime.policy import Policy
from galley.runtime.queue import Queue
from galley.runtime.sampling.params import check as check_params
from galley.types import SamplingParams

__all__ = ["Admission"]


class Admission:
    """Questions only; the scheduler acts on the answers.

    Args:
        context: most tokens of prompt and output together; the pool's size bounds it further.
    """

    def __init__(self, tree: Tree, policy: Policy, *, vocab: int, context: int) -> None:
        self.tree = tree
        self.policy = policy
        self.vocab = vocab
        # The last token drawn is never computed, so it needs no place in a block.
        self.room = min(context, tree.pool.size * tree.block_size + 1)

    def refuse(self, prompt: list[int], params: SamplingParams) -> None:
        """Raise for what could never run, whatever the load (SCH-3). O(len(prompt)).

        Raises ContextLengthExceeded when prompt and output cannot fit the context or the pool,
        InvalidRequest for an empty prompt, an id outside the vocabulary, a missing seed or bad params.
        """
        check_params(params, self.vocab)
        if not prompt:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self.vocab:
            raise InvalidRequest(f"a token id of the prompt is outside 0..{self.vocab - 1}", param="prompt")
        if params.seed is None and not params.greedy:
            raise InvalidRequest("sampling needs a seed by the time it reaches the engine", param="seed")
        most = params.max_tokens
        # Without a draw the last token too is computed, and needs its place in a block.
        room = self.room if most != 0 else min(self.room, self.tree.pool.size * self.tree.block_size)
        if len(prompt) + (1 if most is None else most) > room:
            raise ContextLengthExceeded(
                prompt_tokens=len(prompt), max_tokens=params.max_tokens, context=self.room, param="prompt"
            )

    def match(self, job: Job) -> list[Node]:
        """The longest cached prefix a job may start from (KV-4): all of it, but for what it still reads."""
        path = self.tree.match(job.table.namespace, job.tokens)
        if job.reading is not None:
            del path[job.reading.reach() // self.tree.block_size :]
        return path

    def fits(self, job: Job, path: list[Node], running: Collection[Job]) -> bool:
        """Whether all known tokens fit now, beside what running jobs are expected to need (SCH-10)."""
        tree, pool = self.tree, self.tree.pool
        need = -(-len(job.tokens) // tree.block_size) - len(path)
        # Idle blocks of the match are counted as available, but this job is about to hold them.
        room = pool.available - sum(1 for node in path if pool.ref[node.block] == 0)
        if running:
            need += self.policy.reserve([*running, job], tree.block_size, pool.size)
        return need <= room

    def candidates(self, queue: Queue, now: float) -> Iterator[Job]:
        """Waiting jobs in the order in which they are to be tried, one removed or left before the next.

        That of the queue, but among a few neighbours the one with the longest cached prefix comes first
        (SCH-8). Neighbours are new jobs of one tier, of one tenant or of tenants that have had about the same
        service. A job overtaken ``patience`` times is overtaken no more. Off when the queue is long.
        """
        order, policy = queue.ordered(now), self.policy
        if policy.window < 2 or not 1 < len(queue) <= policy.order_queue:
            yield from order
            return
        following = next(order, None)
        while following is not None:
            near, following = [following], None
            for job in order:
                if len(near) == policy.window or not self._near(near[0], job, queue, now):
                    following = job
                    break
                near.append(job)
            left = dict.fromkeys(near)
            if len(near) > 1:
                hits = {job: len(self.match(job)) for job in near}
                near.sort(key=lambda job: (job.passed < policy.patience, -hits[job]))
            for job in near:
                yield job
                earlier = list(left)
                del left[job]
                if job not in queue:
                    for other in earlier[: earlier.index(job)]:
                        other.passed += 1

    def _near(self, first: Job, job: Job, queue: Queue, now: float) -> bool:
        """Whether it is no matter which of the two goes first."""
        counters = queue.fairness
        return (
            first.state is State.WAITING
            and job.state is State.WAITING
            and queue.tier(first, now) == queue.tier(job, now)
            and (
                first.tenant == job.tenant
                or abs(counters[job.tenant] - counters[first.tenant]) <= self.policy.slack
            )
        )

    def still_held(self, job: Job) -> bool:
        """Whether the job computing this one's prefix is still at it (SCH-8). O(1)."""
        other = job.held_by
        if other is None:
            return False
        if other.state is State.RUNNING and not other.table.diverged and other.table.keyed < job.held_until:
            return True
        job.held_by = None
        return False

    def hold_back(self, job: Job, hit: int, running: Iterable[Job]) -> bool:
        """Whether a running job is about to publish a longer prefix than ``hit`` blocks (SCH-8).

        If so the job is tied to it. Near O(running): only windows of ``policy.hold_back`` tokens are compared
        unless they are equal.
        """
        size = self.tree.block_size
        start, window = hit * size, hit * size + self.policy.hold_back
        if len(job.tokens) <= window or job.reading is not None:
            return False
        head = job.tokens[start:window]
        for other in running:
            if (
                len(other.tokens) - other.computed > 1
                and not other.table.diverged
                and other.tokens[start:window] == head
                and other.table.namespace == job.table.namespace
                and other.tokens[:start] == job.tokens[:start]
            ):
                end = min(len(other.tokens), len(job.tokens) - 1) // size
                shared = hit
                while shared < end and (
                    other.tokens[shared * size : (shared + 1) * size]
                    == job.tokens[shared * size : (shared + 1) * size]
                ):
                    shared += 1
                if (shared - hit) * size >= self.policy.hold_back:
                    job.held_by, job.held_until = other, shared
                    return True
        return False
