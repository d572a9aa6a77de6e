import pytest

from galley.errors import ConfigError
from galley.runtime.memory import plan_memory, size
from tests.fake import fake_spec

GB = 1 << 30


def plan(**given):
    options = {"available": 16 * GB, "limit": None, "max_jobs": 4} | given
    return plan_memory(fake_spec(context=options.pop("context", 8192)), 1024, 16, **options)


def test_holds_a_full_context():
    memory = plan(context=32768)
    assert memory.num_blocks * 16 == 32768
    assert memory.kv_bytes == 32768 * 1024
    assert memory.explanation == "32.0 MiB for 32768 tokens: one full context of 32768 tokens"


def test_or_a_typical_share_for_each_job():
    memory = plan(max_jobs=64)
    assert memory.num_blocks * 16 == 64 * 2048
    assert "2048 tokens for each of 64 jobs" in memory.explanation


def test_takes_at_most_half_of_what_is_available_and_says_what_context_is_left():
    memory = plan(available=8 << 20, context=8192)
    assert memory.kv_bytes == 4 << 20
    assert "half of the 8.0 MiB available" in memory.explanation
    assert "context limited to 4096 of the model's 8192 tokens" in memory.explanation


def test_a_limit_is_obeyed():
    memory = plan(limit=(64 << 20) + 5000)
    assert memory.num_blocks == 4096
    assert "as asked" in memory.explanation
    assert "more than the" in plan(limit=GB, available=GB // 2).explanation
    assert "more than the" not in plan(limit=GB, available=0).explanation


@pytest.mark.parametrize("given", [{"limit": 1000}, {"available": 1000}])
def test_no_room_for_one_block_is_an_error(given):
    with pytest.raises(ConfigError, match="no room"):
        plan(**given)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (150 << 20, "150 MiB")],
)
def test_sizes_for_people(count, text):
    assert size(count) == text


def test_more_than_can_be_numbered_is_refused():
    with pytest.raises(ConfigError, match="2147483647") as refused:
        plan(limit=1 << 50)
    assert refused.value.param == "engine.kv_memory" and refused.value.exit_code == 2
    assert plan(limit=1 << 40).num_blocks == 1 << 26


def test_more_than_the_machine_has_is_refused():
    with pytest.raises(ConfigError, match=r"8\.0 GiB does not fit: this system has 4\.0 GiB") as refused:
        plan(limit=8 * GB, total=4 * GB)
    assert refused.value.param == "engine.kv_memory" and refused.value.exit_code == 2
    assert plan(limit=3 * GB, available=GB, total=4 * GB).kv_bytes == 3 * GB
