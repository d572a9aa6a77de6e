"""How long the state machines run: a few thousand steps in every test run, ``SOAK`` times that on demand."""

import os

from hypothesis import HealthCheck, settings

__all__ = ["machine_settings"]

STEPS = 50


def machine_settings(examples: int) -> settings:
    """``examples`` runs of fifty steps; at least two thousand steps in all."""
    assert examples * STEPS >= 2000
    return settings(
        max_examples=examples * int(os.environ.get("SOAK", "1")),
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
