"""``POST /v1/completions``: the request, checked."""

from typing import Any

from galley.endpoint.params import common, read_stream, sampling
from galley.endpoint.reply import CompletionReply, Options
from galley.endpoint.structure import read_structure
from galley.endpoint.wire import Fields, invalid
from galley.errors import UnsupportedParameter
from galley.types import Request

__all__ = ["CompletionsDoor"]

MAX_PROMPTS = 128


class CompletionsDoor:
    """Reads legacy completion requests: text or token ids, one prompt or several."""

    api = "completions"
    reply = CompletionReply

    def parse(
        self, body: dict[str, Any], *, request_id: str, capture: bool, key: str | None
    ) -> tuple[Request, Options]:
        """A Request, or InvalidRequest naming the field at fault."""
        fields = Fields(body)
        model = fields.checked(fields.need("model"), "model", 512)
        prompts = read_prompts(fields)
        fields.refuse(("reasoning_effort", "thinking_token_budget"), "needs a chat")
        fields.refuse(("suffix", "tools", "tool_choice", "parallel_tool_calls"))
        best_of = fields.integer("best_of", 1)
        n = fields.integer("n", 1)
        if best_of is not None and best_of != (n or 1):
            raise UnsupportedParameter("'best_of' other than 'n' is not supported.", param="best_of")
        logprobs = fields.integer("logprobs", 0, 20)
        echo = fields.boolean("echo")
        shared = common(fields, request_id=request_id, api=self.api, capture=capture, key=key)
        stream, include_usage = read_stream(fields)
        structure, path = read_structure(fields)
        params = sampling(fields, logprobs=logprobs, structure=structure, least=0)
        if len(prompts) * params.n > MAX_PROMPTS:
            message = f"{len(prompts)} prompts with n = {params.n} make more than {MAX_PROMPTS} choices."
            raise invalid(message, "prompt", "array_above_max_length")
        options = Options(
            stream=stream, include_usage=include_usage, return_token_ids=fields.boolean("return_token_ids")
        )
        # The specification has no stored completions, so the wish is named. Refusing to store is met.
        shared["ignored_params"] += (["store"] if fields.boolean("store") else []) + fields.rest()
        request = Request(
            **shared,
            model=model,
            params=params,
            prompts=prompts,
            echo=echo,
            stream=stream,
            structured_path=path,
        )
        return request, options


def read_prompts(fields: Fields) -> list[str | list[int]]:
    """``prompt`` as a list of prompts, each text or ids. Ids are checked against the vocabulary later."""
    value = fields.need("prompt")
    if isinstance(value, str):
        return [fields.checked(value, "prompt")]
    if not isinstance(value, list):
        raise fields.wrong("prompt", "a string, an array of strings, of integers, or of arrays", value)
    if not value:
        raise invalid("'prompt' must not be empty.", "prompt", "empty_array")
    if isinstance(value[0], int) and not isinstance(value[0], bool):
        return [fields.integers("prompt") or []]
    prompts: list[str | list[int]] = []
    for i, item in enumerate(fields.array("prompt", MAX_PROMPTS) or ()):
        if isinstance(item, str):
            prompts.append(fields.checked(item, f"prompt[{i}]"))
        elif isinstance(item, list):
            prompts.append(Fields({f"prompt[{i}]": item}).integers(f"prompt[{i}]") or [])
        else:
            raise fields.wrong(f"prompt[{i}]", "a string or an array of integers", item)
    return prompts
