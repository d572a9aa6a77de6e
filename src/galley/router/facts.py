"""What a request needs of a model and of a provider, read off once, before any decision."""

from decimal import Decimal, InvalidOperation

import msgspec

from galley.errors import InvalidRequest
from galley.types import Request

__all__ = ["CAPABILITIES", "Facts", "last_user_text"]

CAPABILITIES = (
    "chat",
    "completion",
    "tools",
    "json",
    "grammar",
    "vision",
    "logprobs",
    "token_ids",
    "sampling",
    "n",
    "embedding",
    "thinking",
)
"""What a model may be declared able to do. ``token_ids`` needs the tokenizer here; ``json`` is JSON, by
schema or any; ``grammar`` other forms of output (regex, choice, grammar, white space between tokens);
``thinking`` a wish for how much to reason (``reasoning_effort``, a budget);
``sampling`` is the parameters beyond OpenAI's own (top_k, min_p, repetition_penalty, min_tokens …)."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The needs of one request.

    Attributes:
        prompt_tokens: a cautious count, characters / 3 or the number of ids: for quotes.
        prompt_tokens_least: characters / 8, or the number of ids: only what cannot fit by this is excluded
            here, since the real tokenizer checks the rest.
        max_each: most completion tokens of one choice; None where the request has no limit.
        choices: prompts times ``n``.
        needs: capabilities, of CAPABILITIES.
        local_only: the request forbids leaving this machine.
        residency: regions the request allows; empty allows all.
        max_pico: most pico-dollars the request may cost; None for no limit.
        session: key of the conversation, for stickiness.
    """

    model: str
    prompt_tokens: int
    prompt_tokens_least: int = 0
    max_each: int | None = None
    choices: int = 1
    needs: frozenset[str]
    local_only: bool = False
    residency: frozenset[str] = frozenset()
    max_pico: int | None = None
    session: str | None = None

    @classmethod
    def of(cls, request: Request) -> "Facts":
        """Read a request. Its ``metadata`` may narrow further: ``galley.local_only`` = ``true``,
        ``galley.residency`` = ``eu,us``, ``galley.max_usd`` = ``0.01``, ``galley.session`` = any key. It can
        never widen. Raises InvalidRequest for a value that makes no sense.
        """
        p = request.params
        needs = {"chat" if request.messages is not None else "completion"}
        if request.embed is not None:
            needs = {"embedding"}
        if p.logprobs is not None:
            needs.add("logprobs")
        if p.n > 1 or (len(request.prompts or ()) > 1 and request.embed is None):
            needs.add("n")
        if p.logit_bias or p.stop_token_ids or request.template_kwargs or not request.add_generation_prompt:
            needs.add("token_ids")
        if not p.skip_special_tokens or request.echo:
            needs.add("token_ids")
        if request.tools:
            needs.add("tools")
        if p.structured_outputs is not None:
            free = p.structured_outputs.json is None and not p.structured_outputs.json_object
            needs.add("grammar" if free or p.structured_outputs.whitespace_pattern is not None else "json")
        if request.reasoning_effort is not None or request.thinking_budget is not None:
            needs.add("thinking")
        if p.top_k > 0 or p.min_p > 0 or p.repetition_penalty != 1 or p.min_tokens or p.ignore_eos:
            needs.add("sampling")
        if p.include_stop_str_in_output:
            needs.add("sampling")
        tokens = least = 0
        if request.messages is not None:
            for message in request.messages:
                content = message.get("content")
                tokens += 4
                if isinstance(content, str):
                    tokens += len(content) // 3 + 1
                    least += len(content) // 8
                elif isinstance(content, list):
                    for part in content:
                        if isinstance(part, dict) and part.get("type") not in (None, "text"):
                            needs.add("vision")
                        tokens += len(str(part)) // 3 + 1
        for prompt in request.prompts or ():
            if isinstance(prompt, str):
                tokens += len(prompt) // 3 + 1
                least = max(least, len(prompt) // 8)
            else:
                needs.add("token_ids")
                tokens += len(prompt)
                least = max(least, len(prompt))
        return cls(
            model=request.model,
            prompt_tokens=tokens,
            prompt_tokens_least=least,
            max_each=p.max_tokens,
            choices=p.n * max(1, len(request.prompts or ())),
            needs=frozenset(needs),
            local_only=request.local_only or _flag(request.metadata),
            residency=_regions(request),
            max_pico=_limit(request),
            session=request.session or request.metadata.get("galley.session"),
        )


def _flag(metadata: dict[str, str]) -> bool:
    word = metadata.get("galley.local_only", "false")
    if word not in ("true", "false"):
        raise InvalidRequest("galley.local_only is true or false", param="metadata.galley.local_only")
    return word == "true"


def _regions(request: Request) -> frozenset[str]:
    """Both the request's own list and its metadata's must allow a region; none allowed is a region nobody
    has."""
    given = request.metadata.get("galley.residency")
    if given is None:
        return frozenset(request.residency)
    named = frozenset(part.strip() for part in given.split(",") if part.strip())
    if not named:
        raise InvalidRequest("galley.residency names no region", param="metadata.galley.residency")
    both = named & frozenset(request.residency) if request.residency else named
    return both or frozenset(("none in common",))


def _limit(request: Request) -> int | None:
    given = request.metadata.get("galley.max_usd")
    if given is None:
        return request.max_pico
    try:
        usd = Decimal(given)
        if not usd.is_finite() or usd < 0:
            raise InvalidOperation
    except InvalidOperation as error:
        raise InvalidRequest(
            "galley.max_usd is a number of dollars", param="metadata.galley.max_usd"
        ) from error
    limit = int(usd * 10**12)
    return limit if request.max_pico is None else min(limit, request.max_pico)


def last_user_text(request: Request) -> str:
    """The text a classifier may read: the last user turn (or the prompt). Never system or assistant text,
    and what it says is data: a wish for a certain model in it is not a command."""
    if request.messages is None:
        prompt = (request.prompts or [""])[-1]
        return prompt if isinstance(prompt, str) else ""
    for message in reversed(request.messages):
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            return "\n".join(str(part.get("text", "")) for part in content or () if isinstance(part, dict))
    return ""
