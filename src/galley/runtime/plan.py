"""What crosses from the scheduler to the backend in one step: flat arrays, no objects, no numpy.

``array.array`` speaks the buffer protocol, so the native backend reads these without a copy and the core
stays free of numpy.
"""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galley.runtime.job import Job

__all__ = ["Drawn", "Draws", "Plan", "Rows"]


class Plan:
    """One step's work: ordered ``{job: n}``, nothing more. There is no prefill step and no decode step.

    Made by ``Scheduler.plan``, given back to exactly one of ``commit`` and ``fail``. ``n`` tokens of a job
    follow its ``computed`` ones; logits are wanted for the last of them iff that completes its known tokens,
    and for those its ``reading`` scores.
    """

    __slots__ = ("decodes", "now", "predicted", "rows", "scored", "step", "tokens")

    def __init__(self, step: int, now: float = 0.0) -> None:
        self.step = step
        self.now = now
        self.decodes = 0
        """Rows of one token that is not a prompt's, for the measured service rate."""
        self.predicted: float | None = None
        """Seconds it should take, where a cost model says."""
        self.rows: dict[Job, int] = {}
        self.tokens = 0
        self.scored = 0
        """Rows of logits that score tokens of prompts."""

    def __len__(self) -> int:
        """Number of jobs in the step."""
        return len(self.rows)

    def add(self, job: "Job", count: int) -> None:
        """Give a job ``count`` tokens."""
        self.rows[job] = count
        self.tokens += count
        self.scored += scored(job, count)

    def drop(self, job: "Job") -> None:
        """Take a job out again, if it is in (it was preempted while planning)."""
        count = self.rows.pop(job, 0)
        self.tokens -= count
        self.scored -= scored(job, count)

    def log(self) -> list[tuple[str, int]]:
        """``[(job id, n), …]``: the same arrivals and clock give the same log (SCH-9)."""
        return [(job.id, count) for job, count in self.rows.items()]


def scored(job: "Job", count: int) -> int:
    """Tokens of its prompt that a job scores in its next ``count`` ones."""
    if job.reading is None or job.reading.states:
        return 0
    first, last = job.reading.span(job.computed, job.computed + count)
    return last - first


class Rows:
    """The tokens of one step, sequence by sequence.

    Sequence ``s`` contributes the tokens ``tokens[seq_start[s]:seq_start[s+1]]``; the first of them sits at
    position ``context[s]``, which is also the number of positions already in the KV cache. Its KV blocks, in
    order, are ``blocks[block_start[s]:block_start[s+1]]`` and cover ``context[s] + n`` positions.

    ``out`` lists the flat token indices whose logits are wanted, ascending. Row ``r`` of every per-output
    array (logits, Draws, Drawn) belongs to ``out[r]``. ``states`` likewise lists the tokens whose final
    hidden states are wanted; one token may be in both.

    ``adapters[s]`` is the slot of sequence ``s``'s adapter, -1 for none; it ends with the last that has one.

    All arrays are int32 (typecode ``i``).
    """

    __slots__ = ("adapters", "block_start", "blocks", "context", "out", "seq_start", "states", "tokens")

    def __init__(self) -> None:
        self.tokens = array("i")
        self.seq_start = array("i", [0])
        self.context = array("i")
        self.blocks = array("i")
        self.block_start = array("i", [0])
        self.out = array("i")
        self.states = array("i")
        self.adapters = array("i")

    def add(self, tokens: Sequence[int], context: int, blocks: Sequence[int], outputs: int) -> None:
        """Append one sequence; logits are wanted for its last ``outputs`` tokens (0 for a prompt chunk)."""
        if len(tokens) == 1:
            self.tokens.append(tokens[0])
        else:
            self.tokens.extend(tokens)
        end = len(self.tokens)
        self.seq_start.append(end)
        self.context.append(context)
        self.blocks.extend(blocks)
        self.block_start.append(len(self.blocks))
        if outputs == 1:
            self.out.append(end - 1)
        elif outputs:
            self.out.extend(range(end - outputs, end))

    def adapt(self, slot: int) -> None:
        """The sequence just added has the adapter in this slot."""
        last = len(self) - 1
        self.adapters.extend([-1] * (last - len(self.adapters)))
        self.adapters.append(slot)

    def read(self, first: int, last: int, *, states: bool) -> None:
        """Of the sequence just added, want states or logits of the positions ``first .. last - 1``."""
        shift = self.seq_start[-2] - self.context[-1]
        (self.states if states else self.out).extend(range(first + shift, last + shift))

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.context)


class Draws:
    """Sampling instructions for the output rows of the last ``run``; ``R`` rows.

    Order of operations per row (SMP-1): float32 logits, mask and bans to -inf, bias, repetition, frequency
    and presence penalties; then greedy, or temperature, min_p, top_k, top_p and a Gumbel-max draw with Philox
    noise keyed (seed, position, lane, token id) (SMP-4). Ties go to the lowest id.

    Dense, one entry a row:
        temperature f32 (< 1e-5 is greedy), top_k i32 (<= 0 off), top_p f32 (>= 1 off), min_p f32 (<= 0 off),
        repetition f32 (1 off), frequency f32, presence f32,
        seed u64, position i64 (absolute position of the token being drawn), lane i32 (choice number),
        logprobs i32 (-1 none, else number of alternatives),
        given i32 (-1, else the id that is not drawn but given: a prompt's own, for its log-probability).
    Ragged, by ``*_start`` (R + 1 entries, i32):
        bias: ids i32 and values f32; ban: ids i32;
        seen: ids i32 and counts i32 of every distinct token of prompt and output; count is occurrences in the
        *output* (0 when only in the prompt). Repetition applies to all of them; frequency and presence to
        those with count > 0. Present only for rows with a penalty.
    Masks:
        mask_row i32: number of the row's mask, -1 for none; masks: one row of ``ceil(vocab / 32)`` uint32
        words after the other, bit ``id & 31`` of word ``id >> 5`` set where the id is allowed. Filled in by
        the time of ``sample``.
    """

    __slots__ = (
        "ban_ids",
        "ban_start",
        "bias_ids",
        "bias_start",
        "bias_values",
        "frequency",
        "given",
        "lane",
        "logprobs",
        "mask_row",
        "masks",
        "min_p",
        "position",
        "presence",
        "repetition",
        "seed",
        "seen_counts",
        "seen_ids",
        "seen_start",
        "temperature",
        "top_k",
        "top_p",
    )

    def __init__(self) -> None:
        self.temperature = array("f")
        self.top_k = array("i")
        self.top_p = array("f")
        self.min_p = array("f")
        self.repetition = array("f")
        self.frequency = array("f")
        self.presence = array("f")
        self.seed = array("Q")
        self.position = array("q")
        self.lane = array("i")
        self.logprobs = array("i")
        self.given = array("i")
        self.bias_start = array("i", [0])
        self.bias_ids = array("i")
        self.bias_values = array("f")
        self.ban_start = array("i", [0])
        self.ban_ids = array("i")
        self.seen_start = array("i", [0])
        self.seen_ids = array("i")
        self.seen_counts = array("i")
        self.mask_row = array("i")
        self.masks = array("I")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.temperature)

    def add(
        self,
        *,
        seed: int,
        position: int,
        lane: int,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition: float = 1.0,
        frequency: float = 0.0,
        presence: float = 0.0,
        logprobs: int = -1,
        bias: dict[int, float] | None = None,
        ban: Sequence[int] = (),
        seen: dict[int, int] | None = None,
        mask_row: int = -1,
        given: int = -1,
    ) -> None:
        """Append one row."""
        self.temperature.append(temperature)
        self.top_k.append(top_k)
        self.top_p.append(top_p)
        self.min_p.append(min_p)
        self.repetition.append(repetition)
        self.frequency.append(frequency)
        self.presence.append(presence)
        self.seed.append(seed & 0xFFFFFFFFFFFFFFFF)
        self.position.append(position)
        self.lane.append(lane)
        self.logprobs.append(logprobs)
        self.given.append(given)
        if bias:
            self.bias_ids.extend(bias)
            self.bias_values.extend(bias.values())
        self.bias_start.append(len(self.bias_ids))
        self.ban_ids.extend(ban)
        self.ban_start.append(len(self.ban_ids))
        if seen:
            self.seen_ids.extend(seen)
            self.seen_counts.extend(seen.values())
        self.seen_start.append(len(self.seen_ids))
        self.mask_row.append(mask_row)


class Drawn:
    """What ``Backend.sample`` returns, as plain lists of length R.

    Attributes:
        ids: sampled token per row.
        logprobs: raw-model log-probability of the sampled token (nan where not asked for).
        ranks: its rank under the raw logits, 1 = most likely (0 where not asked for).
        tops: per row, the asked-for alternatives ``[(id, logprob), …]``, best first (empty where not asked).
        states: float32 [len(rows.states), hidden] of the same run, put here by the loop; None without any.
    """

    __slots__ = ("ids", "logprobs", "ranks", "states", "tops")

    def __init__(
        self,
        ids: list[int],
        logprobs: list[float],
        ranks: list[int],
        tops: list[list[tuple[int, float]]],
        states: Any = None,
    ) -> None:
        self.ids = ids
        self.logprobs = logprobs
        self.ranks = ranks
        self.tops = tops
        self.states = states
