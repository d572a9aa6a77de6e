"""Does turn N of a conversation render as a prefix of turn N+1, and what does it cost where it does not?

A prefix cache can only keep what stays the same from the first token on. A template that takes reasoning out
of the history, or writes today's date, makes every turn compute again what the last one had computed.
"""

import re
from typing import Any

import msgspec

from galley.errors import GalleyError
from galley.model.chat import ChatTemplate
from galley.model.tokenizer import Tokenizer

__all__ = ["Stability", "check_stability"]

QUESTION = "Tell me something about rivers, number {}."
THOUGHT = "The user asks about rivers. I will name one, and say where it flows."
ANSWER = "The river number {} flows from the hills to the sea, slowly, through a wide valley."
TURNS = 4


class Turn(msgspec.Struct, frozen=True):
    """One step of the sample conversation, in tokens."""

    known: int
    """Prompt and answer of the turn before: what a cache could hold."""
    kept: int
    """How much of that the next prompt begins with."""
    prompt: int
    """The next prompt."""

    @property
    def lost(self) -> int:
        return self.known - self.kept


class Stability(msgspec.Struct, frozen=True, kw_only=True):
    """What the lint found.

    Attributes:
        stable: every turn keeps its whole prompt and answer, but for the last token, which may join with
            what follows.
        prompt_stable: every turn keeps at least its prompt: what is lost is generated text.
        dates: the template writes the time, so prompts change by themselves.
        turns: the sample conversation.
        failure: why it could not be rendered, else None.
    """

    stable: bool = False
    prompt_stable: bool = False
    dates: bool = False
    turns: list[Turn] = []
    failure: str | None = None

    @property
    def lost_share(self) -> float:
        """Lost tokens as a share of what could have been kept, over all turns."""
        known = sum(turn.known for turn in self.turns)
        return sum(turn.lost for turn in self.turns) / known if known else 0.0

    def words(self) -> str:
        """The finding in one line."""
        if self.failure is not None:
            return f"unknown: {self.failure}"
        date = "; writes the time, so prompts change by themselves" if self.dates else ""
        if self.stable:
            return f"stable: each turn continues the last one{date}"
        last = self.turns[-1]
        what = "prompts are kept, answers are not" if self.prompt_stable else "earlier turns are rewritten"
        return (
            f"unstable: {what}; {self.lost_share:.0%} of what a cache holds is computed again"
            f" (turn {len(self.turns) + 1}: {last.lost} of {last.known} tokens){date}"
        )


def check_stability(template: ChatTemplate, tokenizer: Tokenizer, *, turns: int = TURNS) -> Stability:
    """Render a sample conversation turn by turn. O(turns) renderings; a failing template does not raise."""
    dates = bool(re.search(r"strftime_now|\bnow\s*\(", template.source))
    thinks = "</think>" in template.source
    messages: list[dict[str, Any]] = []
    found: list[Turn] = []
    prompt_stable = stable = True
    before: list[int] = []
    before_prompt = 0
    try:
        for number in range(turns + 1):
            messages.append({"role": "user", "content": QUESTION.format(number)})
            prompt = template.encode(tokenizer, messages, add_generation_prompt=True)
            if before:
                kept = common(before, prompt)
                found.append(Turn(len(before), kept, len(prompt)))
                stable = stable and kept >= len(before) - 1
                prompt_stable = prompt_stable and kept >= before_prompt - 1
            answer = ANSWER.format(number)
            generated = answer
            if thinks:
                # A template may open the thought itself, in the generation prompt.
                text = template.render(messages, add_generation_prompt=True)
                opened = text.rstrip().endswith("<think>")
                generated = f"{'' if opened else '<think>'}\n{THOUGHT}\n</think>\n\n{answer}"
                if text.rstrip().endswith("</think>"):
                    generated = answer
            before = prompt + tokenizer.encode(generated, special=True, add_bos=False)
            before_prompt = len(prompt)
            messages.append({"role": "assistant", "content": answer, "reasoning_content": THOUGHT})
    except GalleyError as error:
        return Stability(dates=dates, failure=error.message)
    return Stability(stable=stable, prompt_stable=prompt_stable, dates=dates, turns=found)


def common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))
