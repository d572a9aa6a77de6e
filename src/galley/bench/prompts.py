"""Prompts that no cache has seen: random, from a seed, with a shared beginning only where asked for."""

import random

__all__ = ["Prompts"]

FREQUENT = """
the of and to in is was for on are with as his they at be this from have or by one had not but what
all were when we there can an your which their said if do will each about how up out them then she
many some so these would other into has more her two like him see time could no make than first been
its who now people my made over did down only way find use may water long little very after words
called just where most know get through back much before go good new write our used me man too any
day same right look think also around another came come work three word must because does part even
place well such here take why things help put years different away again off went old number great
tell men say small every found still between name should home big give air line set own under read
last never us left end along while might next sound below saw something thought both few those
always looked show large often together asked house world going want school important until form
food keep children feet land side without boy once animals life enough took sometimes four head
above kind began almost live page got earth need far hand high year mother light parts country
father let night following picture being study second eyes soon times story boys since white days
ever paper hard near sentence better best across during today others however sure means knew try
told young miles sun ways thing whole hear example heard
"""
WORDS = FREQUENT.split()
"""Frequent English words: with a space before it, each is one token of nearly every tokenizer."""


class Prompts:
    """A stream of prompts. The same seed gives the same ones, whatever their lengths were before.

    Args:
        tokens: about how many tokens a prompt is to have; the server's count is what results quote.
        shared: how many of them, at the beginning, all prompts of this seed have in common.

    A chat template adds its own tokens; nothing is taken off for them.
    """

    def __init__(self, *, seed: int, tokens: int, shared: int = 0) -> None:
        if tokens < 1 or not 0 <= shared < tokens:
            raise ValueError(f"a prompt of {tokens} tokens cannot share {shared}")
        self.tokens = tokens
        self.shared = shared
        self._seed = seed

    def text(self, number: int, tokens: int | None = None) -> str:
        """Prompt ``number``; ``tokens`` instead of the usual length.

        Numbers below zero are for warming up: what they begin with, no other prompt does. Raises ValueError
        for a length that leaves nothing of its own.
        """
        own = (self.tokens if tokens is None else tokens) - self.shared
        if own < 1:
            raise ValueError(f"a prompt of {tokens} tokens cannot share {self.shared}")
        common, noise = self._noise(number)
        return " ".join(common.choices(WORDS, k=self.shared) + noise.choices(WORDS, k=own))

    def ids(self, number: int, vocab: range) -> list[int]:
        """Prompt ``number`` as token ids drawn from ``vocab``, for engines in this process."""
        common, noise = self._noise(number)
        return common.choices(vocab, k=self.shared) + noise.choices(vocab, k=self.tokens - self.shared)

    def _noise(self, number: int) -> tuple[random.Random, random.Random]:
        shared = f"{self._seed}/shared" + (f"/{number}" if number < 0 else "")
        return random.Random(shared), random.Random(f"{self._seed}/{number}")
