# ruff: noqa: E501
"""Is each rule really held by the test that names it? Break the rule in a copy of the source; the test must fail.

    python -m tests.mutants            every mutant, about five minutes
    python -m tests.mutants SCH-7 TXT  only those whose rule begins so

Exit code 1 when a mutant survives, or when the text it changes is no longer in the source.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """One broken rule."""

    rule: str
    file: str
    """Under ``src/galley``."""
    before: str
    after: str
    test: str
    """File and ``-k`` expression, under ``tests``: ``FILE::EXPRESSION``."""


S, P, Q = "runtime/scheduler.py", "runtime/preemption.py", "runtime/queue.py"
INTAKE = "runtime/intake.py"
SCHEDULER = "unit/runtime/test_scheduler.py"
FAIR = "unit/runtime/test_fairness.py"
PREEMPT = "unit/runtime/test_preemption.py"
ENGINE = "unit/runtime/test_engine.py"
STREAM = "unit/text/test_stream.py"

MUTANTS = [
    Mutant("SCH-1", S, "if most > 0 and (count := self.preemption.reach(job, most, plan, now)) > 0:", "if (count := self.preemption.reach(job, most, plan, now)) >= 0 and job.state is State.RUNNING:", f"{SCHEDULER}::sch1_a_prompt"),
    Mutant("SCH-1", INTAKE, "it.token_budget - plan.tokens, it.chunk)", "1 << 30, it.chunk)", f"{SCHEDULER}::sch1_chunks"),
    Mutant("SCH-1", S, "self.max_jobs = max_jobs", "self.max_jobs = 1 << 30", f"{SCHEDULER}::sch1_max_jobs"),
    Mutant("SCH-2", S, "        chunks = self._decodes(plan, now)\n", "        self.intake.admit(plan, now, before)\n        chunks = self._decodes(plan, now)\n", f"{SCHEDULER}::sch2_decodes_come_first"),
    Mutant("SCH-2", S, "room = self.token_budget - plan.tokens", "room = 100_000", f"{SCHEDULER}::sch2_a_6000"),
    Mutant("SCH-2", S, "if late:", "if False:", f"{FAIR}::half_of_the_step"),
    Mutant("SCH-2", S, "budget -= min(", "budget -= 0 * min(", f"{FAIR}::urgent"),
    Mutant("SCH-3", "runtime/admission.py", "if wanted > self.room:", "if False:", f"{SCHEDULER}::sch3"),
    Mutant("SCH-3", S, "self.preemption.force(plan, now)", "pass", f"{PREEMPT}::sch3"),
    Mutant("SCH-4", INTAKE, "job.skipped > it.policy.patience", "False", f"{SCHEDULER}::sch4"),
    Mutant("SCH-4", INTAKE, "if stuck or missed >= it.policy.look:", "if True:", f"{SCHEDULER}::sch4"),
    Mutant("SCH-5", "runtime/policy.py", "rank = (job.tier, -(job.computed % block_size), job.sequence)", "rank = (-job.tier, -(job.computed % block_size), job.sequence)", f"{SCHEDULER}::sch5_victim"),
    Mutant("SCH-5", "runtime/policy.py", "rank = (job.tier, -(job.computed % block_size), job.sequence)", "rank = (job.tier, job.computed % block_size, job.sequence)", f"{SCHEDULER}::sch5_victim"),
    Mutant("SCH-5", "runtime/policy.py", "rank = (job.tier, -(job.computed % block_size), job.sequence)", "rank = (job.tier, -(job.computed % block_size), -job.sequence)", f"{SCHEDULER}::sch5_victim"),
    Mutant("SCH-5", "runtime/policy.py", "if spared and not forced:", "if False:", f"{SCHEDULER}::sch5_victim"),
    Mutant("SCH-5", P, "it.tree.release(job.table, job.tokens, job.computed)", "it.tree.release(job.table, job.tokens, 0) or it.tree.evict(it.pool.idle)", f"{PREEMPT}::sch5_only_the_tail"),
    Mutant("SCH-5", INTAKE, "stuck = job.state is State.PREEMPTED or", "stuck =", f"{PREEMPT}::sch5_new_jobs"),
    Mutant("SCH-5", Q, "return (tier, job.state is State.WAITING, counter, job.sequence)", "return (tier, job.state is State.PREEMPTED, counter, job.sequence)", f"{SCHEDULER}::sch5_preempted_before_new"),
    Mutant("SCH-6", P, "it.tree.release(job.table, job.tokens, job.computed)\n        it.stop(job)\n        job.computed = 0", "it.stop(job)", f"{PREEMPT}::sch6"),
    Mutant("SCH-7", "runtime/fairness.py", "self._counters[tenant] = self[tenant] + cost / self.weight(tenant)", "pass", f"{FAIR}::service_gap"),
    Mutant("SCH-7", "runtime/fairness.py", "cost / self.weight(tenant)", "cost", f"{FAIR}::weights_divide"),
    Mutant("SCH-7", "runtime/fairness.py", "            self._lift(tenant, tier)\n", "", f"{FAIR}::idleness"),
    Mutant("SCH-7", "runtime/fairness.py", "if min(tiers) <= tier:", "if True:", f"{FAIR}::lower_tier"),
    Mutant("SCH-7", "runtime/fairness.py", "floor - credit)", "floor)", f"{FAIR}::not_behind_those"),
    Mutant("SCH-7", "runtime/fairness.py", "floor - credit)", "floor - 2 * credit)", f"{FAIR}::bounded_credit"),
    Mutant("SCH-7", "runtime/fairness.py", "yield max(self[other], self._levels.get(other, 0.0))", "yield self[other]", f"{FAIR}::do_not_add_up"),
    Mutant("SCH-7", "runtime/fairness.py", "if known else 0.0", "", f"{FAIR}::made_up_names"),
    Mutant("SCH-7", INTAKE, "it.fairness.prompt(job.tenant", "it.fairness.price(job.tenant", f"{FAIR}::service_gap or flood"),
    Mutant("SCH-7", S, "self.fairness.output(job.tenant, len(new))", "pass", f"{FAIR}::service_gap"),
    Mutant("SCH-7", Q, "lifted = int((now - job.meter.arrived) // self.age_s)", "lifted = 0", f"{FAIR}::ageing"),
    Mutant("SCH-7", Q, "return max(job.tier - lifted, min(top, job.tier))", "return job.tier - lifted", f"{FAIR}::age_does_not"),
    Mutant("SCH-7", S, "            self.intake.admit(plan, now, before, job)\n", "", f"{FAIR}::prompts_of_running"),
    Mutant("SCH-7", INTAKE, "free = it.preemption.clear(job, plan, now)", "pass", f"{FAIR}::urgent_prompt"),
    Mutant("SCH-8", "runtime/admission.py", "if (shared - hit) * size >= self.policy.hold_back:", "if False:", f"{SCHEDULER}::sch8_simultaneous"),
    Mutant("SCH-8", "runtime/admission.py", "(job.passed < policy.patience, -hits[job])", "(job.passed < policy.patience, 0)", f"{SCHEDULER}::sch8_the_longest"),
    Mutant("SCH-8", "runtime/admission.py", "<= self.policy.slack", "<= 1e18", f"{SCHEDULER}::sch8_not_beyond"),
    Mutant("SCH-8", "runtime/admission.py", "or not 1 < len(queue) <= policy.order_queue", "", f"{SCHEDULER}::sch8_not_when"),
    Mutant("SCH-8", "runtime/admission.py", "other.passed += 1", "pass", f"{SCHEDULER}::sch8_a_job_is_not_overtaken"),
    Mutant("SCH-9", S, "plan = Plan(self.counters.steps, now)", "plan = Plan(self.counters.steps, now)\n        import random\n        self.chunk = random.randrange(1, 9)", "unit/runtime/test_journal.py::same_plans"),
    Mutant("SCH-9", "runtime/journal.py", "if planned != event[\"rows\"]:", "if False:", "unit/runtime/test_journal.py::sch9"),
    Mutant("SCH-10", "runtime/admission.py", "need += self.policy.reserve(", "need += 0 * self.policy.reserve(", f"{SCHEDULER}::sch10_admission"),
    Mutant("SCH-10", "runtime/policy.py", "self.ratio = min(1.0, self.ratio + 0.3)", "pass", f"{SCHEDULER}::sch10_the_estimate"),
    Mutant("SCH-10", "runtime/policy.py", "self.ratio = max(self.floor, self.ratio * 0.995)", "pass", f"{SCHEDULER}::sch10_the_estimate"),
    Mutant("CAN-1", "endpoint/client.py", "                self.gone = True\n                task.cancel()", "                self.gone = True", "faults/test_vanishing_clients.py::stops_within and decode"),
    Mutant("CAN-1", "runtime/engine.py", "            if not last:\n                self.cancel(job_id)", "            pass", f"{ENGINE}::can1"),
    Mutant("CAN-2", S, "job.verdict = job.verdict or verdict", "self._end(job, now, verdict)", f"{SCHEDULER}::can2_in_flight"),
    Mutant("CAN-2", S, "        elif job is not None:\n", "        else:\n", f"{SCHEDULER}::can2_cancel"),
    Mutant("CAN-3", "runtime/loop.py", "            except Exception as error:\n", "            except KeyError as error:\n", f"{SCHEDULER}::can3"),
    Mutant("CAN-3", S, "None if job.verdict else State.FAILED, keep=0)", "None if job.verdict else State.FAILED, keep=job.computed + plan.rows[job])", f"{SCHEDULER}::can3"),
    Mutant("CAN-3", "runtime/engine.py", "self.scheduler.reset(fault, self._clock())", "pass", f"{ENGINE}::defect"),
    Mutant("CAN-4", "runtime/mailbox.py", "self._pending = out if self._pending is None else self._pending.then(out)", "self._pending = out", f"{ENGINE}::can4"),
    Mutant("CAN-4", "providers/outbox.py", "if earlier and in_order(earlier[-1], delta):", "if False:", "unit/router/test_local.py::can4"),
    Mutant("CAN-5", S, "for late, error in self.deadlines.due(now):", "for late, error in ():", f"{SCHEDULER}::can5"),
    Mutant("CAN-5", "runtime/deadlines.py", "kind == \"queue\" and job.meter.first_scheduled is not None", "False", f"{SCHEDULER}::can5_queue"),
    Mutant("CAN-5", "runtime/gate.py", "each = UNKNOWN if wait is None else", "each = UNKNOWN if True else", "unit/runtime/test_gate.py::can5_a_full"),
    Mutant("CAN-5", "runtime/gate.py", "wait > max_queue_s:", "False:", "unit/runtime/test_gate.py::can5_a_deadline"),
    Mutant("CAN-5", "runtime/gate.py", "at = max(now + soonest_s, self._promised.get(tenant, 0.0) + each)", "at = now + soonest_s", "unit/runtime/test_gate.py::when_told"),
    Mutant("CAN-5", "runtime/rate.py", "return steps * one * self.pace", "return steps * one", "unit/runtime/test_gate.py::corrected_by"),
    Mutant("CAN-5", S, "began = plan.now if self._turned is None else self._turned", "began = plan.now", "unit/runtime/test_gate.py::between_two"),
    Mutant("CAN-5", "errors.py", "self.status = 504", "pass", "unit/endpoint/test_terms.py::can5"),
    Mutant("CAN-6", "runtime/engine.py", "            if self._draining:\n                raise", "            if False:\n                raise", f"{ENGINE}::can6"),
    Mutant("CAN-6", "runtime/engine.py", "        while self._readers:\n            await", "        while False:\n            await", f"{ENGINE}::can6"),
    Mutant("TXT-1", "runtime/text/stream.py", "self._decoder.decode(self._bytes(token))", "self._bytes(token).decode('utf-8', 'replace')", f"{STREAM}::txt1"),
    Mutant("TXT-2", "runtime/text/stream.py", "self.stop = None\n\n    def push", "self._decoder.decode(b''.join(map(tokenizer.token_bytes, prompt_ids)))\n        self.stop = None\n\n    def push", f"{STREAM}::txt2"),
    Mutant("TXT-3", "runtime/text/stream.py", "getincrementaldecoder(\"utf-8\")(\"replace\")", "getincrementaldecoder(\"utf-8\")(\"ignore\")", f"{STREAM}::txt3"),
    Mutant("TXT-4", "runtime/text/stream.py", "self._count >= self._min_tokens", "True", f"{STREAM}::txt4_not_before"),
    Mutant("TXT-4", "runtime/text/stream.py", "return Piece(\"\".join(out), stop, index + 1)", "return Piece(\"\".join(out), stop, len(ids))", f"{STREAM}::txt4_kept"),
    Mutant("TXT-4", "runtime/text/stream.py", "sure = len(whole) - matcher.held[state]", "sure = len(whole) - min(len(whole), max(map(len, matcher.patterns)) - 1)", f"{STREAM}::txt4_held"),
    Mutant("TXT-4", "runtime/text/matcher.py", "if self._best[fail] >= 0 and (", "if self._best[fail] >= 0 and not (", f"{STREAM}::txt4"),
    Mutant("TXT-5", "runtime/text/stream.py", "return held + tail", "return tail", f"{STREAM}::txt5"),
    Mutant("TXT-7", "endpoint/reply.py", "if not self.options.include_usage:", "if True:", "unit/endpoint/test_finish.py::txt7"),
    Mutant("TXT-7", "providers/choice.py", "finish, stop, ids = \"stop\", stopped, ids[:kept]", "finish, stop = \"length\", stopped", "unit/router/test_local.py::txt4"),
    Mutant("SMP-1", "runtime/sampling/logits.py", "kept = kept[values[kept] >= peak + np.log(np.float32(min_p))]", "kept = kept[values[kept] >= 0.5 * peak + np.log(np.float32(min_p))]", "property/test_sampling.py::smp1"),
    Mutant("SMP-1", "runtime/sampling/logits.py", "old = values[seen]", "old = raw[seen]", "unit/sampling/test_logits.py::smp1"),
    Mutant("SMP-2", "runtime/sampling/logits.py", "_rank(raw, token, wanted) if", "_rank(_adjust(raw, draws, row), token, wanted) if", "unit/sampling/test_logits.py::smp2"),
    Mutant("SMP-3", "runtime/sampling/logits.py", "return int(values.argmax())", "return int(len(values) - 1 - values[::-1].argmax())", "unit/sampling/test_logits.py::smp3"),
    Mutant("SMP-4", "runtime/loop.py", "position=length,", "position=length - job.prompt_len,", "unit/runtime/test_loop.py::position or smp4"),
    Mutant("SMP-4", "runtime/sampling/philox.py", "counter[:, 1] = lane & 0xFFFFFFFF", "counter[:, 1] = 0", "unit/sampling/test_philox.py::key"),
    Mutant("SMP-5", "providers/local.py", "{backend.isa} {backend.fingerprint}", "{backend.isa}", "unit/router/test_local.py::smp5"),
    Mutant("SMP-5", "providers/local.py", "every = \"|\".join(msgspec.structs.astuple(self.digests))", "every = self.digests.engine", "unit/router/test_local.py::smp5"),
    Mutant("SMP-6", "runtime/loop.py", "rows.add(tokens[start:end], start, job.table.blocks", "rows.add(tokens[start:end], start - start % 2, job.table.blocks", "equality/test_matrix.py::smp6 and reference and llama"),
    Mutant("SLP-1", "providers/resident.py", "await self.quiet.wait()", "pass", "e2e/test_models.py::slp1_sleep_waits"),
    Mutant("SLP-1", "providers/resident.py", "                self.state = \"draining\"\n", "", "e2e/test_models.py::slp1_sleep_waits"),
    Mutant("SLP-2", "providers/resident.py", "opened, self.opened = self.opened, None\n                self.card", "opened, self.opened = self.opened, self.opened\n                self.card", "e2e/test_models.py::slp2"),
    Mutant("SLP-3", "providers/resident.py", "self._rousing = asyncio.create_task(self._rouse())", "raise Overloaded('asleep')", "e2e/test_models.py::slp3"),
    Mutant("SLP-3", "providers/resident.py", "async with asyncio.timeout(self._wake_s):", "async with asyncio.timeout(None):", "unit/router/test_resident.py::slp3"),
    Mutant("SLP-4", "providers/fleet.py", "idle.sort(key=lambda other: other.last_used)", "idle.sort(key=lambda other: -other.last_used)", "e2e/test_models.py::slp4_the_least"),
    Mutant("SLP-4", "providers/fleet.py", "and not other.pinned and", "and", "e2e/test_models.py::slp4_no_room"),
    Mutant("SLP-4", "providers/fleet.py", "if status.sleeps_in_s == 0.0 and not resident.users:", "if False:", "e2e/test_models.py::slp4_idle"),
    Mutant("SLP-5", "providers/resident.py", "asyncio.to_thread(self._open, self._kept)", "asyncio.to_thread(self._open, None)", "unit/router/test_resident.py::slp5"),
    Mutant("SLP-6", "endpoint/admin.py", "if self._key is None or not hmac", "if False and not hmac", "e2e/test_models.py::slp6"),
    Mutant("SLP-6", "endpoint/admin.py", "        if self._key is None:\n            return shown\n", "", "e2e/test_models.py::slp6"),
]  # fmt: skip


def survives(mutant: Mutant) -> str | None:
    """None when the test noticed; else what happened."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        path = source / "galley" / mutant.file
        text = path.read_text()
        if mutant.before not in text:
            return "the text to change is not there any more"
        path.write_text(text.replace(mutant.before, mutant.after))
        file, _, names = mutant.test.partition("::")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{file}"]
        if names:
            command += ["-k", names]
        env = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            ran = subprocess.run(
                command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            return None  # it hangs: noticed
    if ran.returncode == 1:
        return None
    return f"exit code {ran.returncode}: {ran.stdout.strip().splitlines()[-1:]}"


def main(wanted: list[str]) -> int:
    chosen = [m for m in MUTANTS if not wanted or any(m.rule.startswith(name) for name in wanted)]
    with ThreadPoolExecutor(2) as pool:
        left = 0
        for mutant, fault in zip(chosen, pool.map(survives, chosen), strict=True):
            left += fault is not None
            print(
                f"{mutant.rule:<7}{'SURVIVED' if fault else 'noticed':<9} {mutant.test}  {fault or ''}",
                flush=True,
            )
    print(f"{len(chosen) - left} of {len(chosen)} noticed")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
