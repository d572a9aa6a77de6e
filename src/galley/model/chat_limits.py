"""What one rendering of a chat template may use of time and memory."""

import sys
import time
from typing import Any

MAX_NODES = 200_000
"""Values inside one container, nested ones counted each time they appear."""
MAX_RANGE = 10_000
MAX_INT_BITS = 4096


class LimitError(Exception):
    """The template took too long or made too much."""


class Allowance:
    """What one rendering may still use: ``chars`` in any one string, ``bytes_left`` in all, and time."""

    __slots__ = ("bytes_left", "chars", "deadline")

    def __init__(self, chars: int, seconds: float) -> None:
        self.chars = chars
        self.bytes_left = 64 * chars
        self.deadline = time.monotonic() + seconds

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise LimitError("the template ran longer than its time limit")

    def length(self, chars: int) -> None:
        """Ask before making a string of that many characters."""
        if chars > self.chars:
            raise LimitError(f"the template made a text of {chars} characters; the limit is {self.chars}")

    def charge(self, value: Any) -> Any:
        """Pay for a value just made, and pass it on."""
        if isinstance(value, str):
            self.length(len(value))
            self.bytes_left -= sys.getsizeof(value)
        elif isinstance(value, list | tuple | dict):
            self.measure(value)
            self.bytes_left -= sys.getsizeof(value)
        elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise LimitError("the template made a number of thousands of bits")
        if self.bytes_left < 0:
            raise LimitError("the template used up its memory")
        return value

    def measure(self, value: Any) -> tuple[int, int]:
        """Refuse a container whose text would be huge: it may repeat one small list 2^40 times.

        Returns how many values it holds, each counted as often as it appears, and how deep they nest.
        """
        seen, chars, deepest = 0, 0, 0
        stack = [(value, 1)]
        while stack:
            item, depth = stack.pop()
            seen += 1
            if seen % 4096 == 0:
                self.tick()
            deepest = max(deepest, depth)
            if isinstance(item, dict):
                stack += [(key, depth + 1) for key in item]
                stack += [(inner, depth + 1) for inner in item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                stack += [(inner, depth + 1) for inner in item]
            elif isinstance(item, str):
                chars += len(item)
            if seen + len(stack) > MAX_NODES:
                raise LimitError(f"the template made a structure of over {MAX_NODES} values")
        self.length(chars)
        return seen, deepest
