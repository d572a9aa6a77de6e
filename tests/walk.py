"""A drunk writer: writes any output a grammar permits, choosing tokens at random. No model."""

import random
from array import array

from galley.model.tokenizer import Tokenizer
from galley.runtime.guide import Grammar

__all__ = ["walk"]

CLOSERS = set('"]}0123456789,')


def walk(
    grammar: Grammar, tokenizer: Tokenizer, vocab: int, seed: int, *, most: int = 400, lead: str = ""
) -> str | None:
    """The text, or None where it grew beyond ``most`` tokens. Closing characters are preferred. It begins
    with ``lead``, which the grammar must permit."""
    rng = random.Random(seed)
    guide = grammar.guide()
    ids = [] if lead else guide.begin(most)
    for token in tokenizer.encode(lead) if lead else ():
        ids += [token, *guide.accept(token, 0)]
    masks = array("I", [0]) * -(-vocab // 32)
    while not guide.ended:
        guide.fill(masks, 0)
        allowed = [i for i in range(vocab) if masks[i >> 5] >> (i & 31) & 1]
        assert allowed, "nothing is allowed"
        closing = [i for i in allowed if i in tokenizer.eos_ids or set(tokenizer.decode([i])) <= CLOSERS]
        token = rng.choice(closing if closing and rng.random() < 0.4 else allowed)
        ids.append(token)
        ids += guide.accept(token, most)
        if token in tokenizer.eos_ids:
            ids.pop()
            break
        if len(ids) > most:
            return None
    return tokenizer.decode(ids)
