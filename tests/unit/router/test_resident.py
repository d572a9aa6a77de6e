"""A model that sleeps, by itself: what waits for whom, and what is kept (SLP-1, SLP-3, SLP-5)."""

import asyncio
import threading

import pytest

from galley.errors import BadModelFile, Overloaded
from galley.providers.adapters import Adapters
from galley.providers.base import Meter, ModelCard
from galley.providers.fleet import Fleet
from galley.providers.resident import Resident
from tests.unit.endpoint.fake import FakeProvider


class File:
    """Stands for an open Model."""

    def __init__(self):
        self.closed = 0

    def close(self):
        self.closed += 1


class Engineered:
    """Stands for an Opened: a provider, an open file, and whether it is closed."""

    def __init__(self, kept=None):
        self.provider = FakeProvider()
        self.provider.adapters = Adapters()
        self.model = kept or File()
        self.owner = kept is None
        self.bytes = 100
        self.closed = False

    def release(self):
        self.owner = False
        return self.model

    def close(self):
        self.closed = True
        if self.owner:
            self.model.close()


class Opener:
    """Opens models when ``gate`` is open; remembers each."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.made: list[Engineered] = []
        self.given: list[object] = []
        self.fault: Exception | None = None

    def __call__(self, kept, adapters):
        assert self.gate.wait(10)
        if self.fault is not None:
            raise self.fault
        self.given.append(kept)
        self.made.append(Engineered(kept))
        return self.made[-1]


def resident(opener, **options):
    fleet = Fleet(sizes=lambda name: 100, **{k: options.pop(k) for k in ("budget",) if k in options})
    made = Resident(ModelCard(id="fake-1b", context=100, created=1), opener, fleet, **options)
    fleet.add(made)
    return made


async def test_slp3_a_request_does_not_wait_for_ever():
    opener = Opener()
    model = resident(opener, wake_s=0.05)
    opener.gate.clear()
    for _ in range(2):
        with pytest.raises(Overloaded) as refused:
            await asyncio.wait_for(model.awake(), 5)
        assert refused.value.code == "model_waking" and refused.value.retry_after_s
    opener.gate.set()  # the opening went on, and is what the next request finds
    while model.state != "awake":
        await asyncio.sleep(0.01)
    await model.awake()
    assert len(opener.made) == 1 and model.users == model.holders == 0


async def test_slp3_a_model_that_cannot_be_opened_says_so_and_may_be_tried_again():
    opener = Opener()
    opener.fault = BadModelFile("m.gguf", "magic", "not a GGUF file")
    model = resident(opener)
    with pytest.raises(BadModelFile):
        await model.awake()
    assert model.state == "asleep" and model.users == 0
    opener.fault = None
    await model.awake()
    assert model.state == "awake"


async def test_slp5_level_1_keeps_the_file_open_and_level_2_does_not():
    opener = Opener()
    model = resident(opener)
    await model.awake()
    assert await model.sleep(1)
    assert opener.made[0].closed and opener.made[0].model.closed == 0 and model.level == 1
    await model.awake()
    assert opener.given == [None, opener.made[0].model], "it was given the open file back"
    assert await model.sleep(1) and await model.sleep(2)
    assert opener.made[0].model.closed == 1 and model.level == 2
    await model.awake()
    assert opener.given[-1] is None
    await model.shut()
    assert opener.made[-1].closed and opener.made[-1].model.closed == 1 and model.state == "asleep"


async def test_slp1_sleep_is_called_off_when_a_request_does_not_end():
    opener = Opener()
    model = resident(opener, drain_s=0.05)
    use_meter = Meter()
    prepared = await model.prepare(request())
    run = await model.start(prepared, use_meter)
    assert not await model.sleep() and model.state == "awake" and not opener.made[0].closed
    await run.stop()
    await run.stop()
    assert model.users == model.holders == 0
    assert await model.sleep() and opener.made[0].closed


async def test_slp4_two_that_wake_at_once_do_not_both_take_the_last_room():
    opener = Opener()
    fleet = Fleet(budget=150, sizes=lambda name: 100)
    models = [Resident(ModelCard(id=name, context=9, created=1), opener, fleet) for name in "ab"]
    for model in models:
        fleet.add(model)
    opener.gate.clear()
    first = asyncio.create_task(models[0].awake())
    await asyncio.sleep(0.02)
    with pytest.raises(Overloaded) as refused:
        await models[1].awake()
    assert refused.value.code == "no_memory"
    opener.gate.set()
    await first
    await models[1].awake()  # the first is idle by now, and makes room
    assert (models[0].state, models[1].state) == ("asleep", "awake")


def request():
    from galley.types import Request, SamplingParams

    return Request(
        id="r", api="completions", model="fake-1b", params=SamplingParams(), created=1.0, prompts=["hi"]
    )
