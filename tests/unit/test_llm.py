"""LLM on a tiny random model: shapes, receipts, stops, and equality with the parts it is made of."""

import pytest

from galley import LLM, SamplingParams, StructuredOutputs
from galley.audit.receipts import ReceiptStore
from galley.errors import ContextLengthExceeded, EngineFault, InvalidRequest, ModelNotFound
from tests.tiny import tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", seed=1)


@pytest.fixture(scope="module")
def llm(path, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with LLM(str(path), home=home, backend="reference", kv_memory=8 << 20) as opened:
        yield opened


def params(**given):
    return SamplingParams(**({"temperature": 0.0, "seed": 1, "max_tokens": 12, "ignore_eos": True} | given))


def test_generate_gives_vllms_shapes(llm):
    (result,) = llm.generate("the thing", params(logprobs=2))
    assert result.prompt == "the thing"
    assert result.prompt_token_ids == llm.model.tokenizer.encode("the thing")
    (out,) = result.outputs
    assert (out.index, out.finish_reason, out.stop_reason) == (0, "length", None)
    assert len(out.token_ids) == 12
    assert out.text == llm.model.tokenizer.decode(out.token_ids)
    assert len(out.logprobs) == 12
    for token, listed in zip(out.token_ids, out.logprobs, strict=True):
        assert listed[token].rank == 1
        assert len(listed) == 2
    assert out.cumulative_logprob == pytest.approx(
        sum(listed[t].logprob for t, listed in zip(out.token_ids, out.logprobs, strict=True))
    )
    assert result.usage.completion_tokens == 12
    assert result.usage.prompt_tokens == len(result.prompt_token_ids)


def test_prompts_may_be_ids_and_many_and_say_what_each_says_alone(llm):
    prompts = ["one two", "three", "the other thing and more"]
    together = llm.generate(prompts, params())
    ids = [llm.model.tokenizer.encode(prompt) for prompt in prompts]
    assert [r.outputs[0].token_ids for r in llm.generate(ids, params())] == [
        r.outputs[0].token_ids for r in together
    ]
    for prompt, result in zip(prompts, together, strict=True):
        assert llm.generate(prompt, params())[0].outputs[0].text == result.outputs[0].text
    assert llm.generate(ids[0], params())[0].prompt is None


def test_n_choices_have_lanes_of_noise(llm):
    (result,) = llm.generate("the thing", params(n=3, temperature=1.0))
    assert [out.index for out in result.outputs] == [0, 1, 2]
    assert len({tuple(out.token_ids) for out in result.outputs}) == 3
    assert result.usage.completion_tokens == 36
    (again,) = llm.generate("the thing", params(n=3, temperature=1.0))
    assert [out.token_ids for out in again.outputs] == [out.token_ids for out in result.outputs]


def test_params_for_each_prompt(llm):
    a, b = llm.generate(["x", "y"], [params(max_tokens=3), params(max_tokens=5)])
    assert (len(a.outputs[0].token_ids), len(b.outputs[0].token_ids)) == (3, 5)
    with pytest.raises(InvalidRequest):
        llm.generate(["x", "y"], [params()])


def test_stop_strings_end_the_text_and_the_job(llm):
    (whole,) = llm.generate("the thing", params(max_tokens=40))
    text = whole.outputs[0].text
    stop = text[6:9]
    (cut,) = llm.generate("the thing", params(max_tokens=40, stop=[stop]))
    out = cut.outputs[0]
    assert out.text == text[: text.index(stop)]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert len(out.token_ids) < 40
    assert cut.usage.completion_tokens == len(out.token_ids)
    (kept,) = llm.generate("the thing", params(max_tokens=40, stop=stop, include_stop_str_in_output=True))
    assert kept.outputs[0].text == text[: text.index(stop)] + stop
    assert llm.engine.stats().blocks_used == 0


def test_stop_token_ids_are_named_and_not_shown(llm):
    (whole,) = llm.generate("the thing", params())
    token = whole.outputs[0].token_ids[4]
    (cut,) = llm.generate("the thing", params(stop_token_ids=[token]))
    out = cut.outputs[0]
    assert (out.finish_reason, out.stop_reason) == ("stop", token)
    assert out.token_ids[-1] == token
    assert out.text == llm.model.tokenizer.decode(out.token_ids[:-1])


def test_chat_renders_the_template(llm):
    messages = [{"role": "user", "content": "hello"}]
    (result,) = llm.chat(messages, params())
    assert result.prompt is None
    assert result.prompt_token_ids == llm.model.template.encode(llm.model.tokenizer, messages)
    two = llm.chat([messages, messages], params())
    assert [r.outputs[0].text for r in two] == [result.outputs[0].text] * 2


def test_every_prompt_leaves_one_receipt(path, tmp_path):
    receipts = ReceiptStore(tmp_path / "r.sqlite")
    with LLM(str(path), home=tmp_path, backend="reference", kv_memory=8 << 20, receipts=receipts) as llm:
        results = llm.generate(["a b", "c"], params(n=2))
        results += llm.chat([{"role": "user", "content": "x"}], params(seed=None, temperature=1.0))
        llm.model.template = None
        with pytest.raises(InvalidRequest):
            llm.chat([{"role": "user", "content": "x"}])
    assert receipts.flush(5)
    stored = {receipt.id: receipt for receipt in receipts.list(limit=10)}
    assert stored == {result.receipt.id: result.receipt for result in results}
    first = results[0].receipt
    assert (first.status, first.api, len(first.choices)) == ("ok", "python.generate", 2)
    assert first.digests.weights
    assert first.resources.steps > 0
    assert first.resources.prefill_flop > 0
    assert first.times.ttft_s is not None
    assert results[2].receipt.params["seed"] is not None
    assert first.prompt is None
    receipts.close()


def test_nothing_runs_unless_every_prompt_is_good(llm):
    before = llm.engine.stats().steps
    with pytest.raises(ContextLengthExceeded):
        llm.generate(["fine", [5] * 600], params())
    with pytest.raises(InvalidRequest):
        llm.generate(["fine", 7], params())
    with pytest.raises(InvalidRequest):
        llm.generate([[1, 99999]], params())
    with pytest.raises(InvalidRequest) as refused:
        llm.generate("fine", params(top_p=2.0))
    assert refused.value.param == "top_p"
    assert llm.engine.stats().steps == before
    assert llm.generate([], params()) == []


def test_a_fault_is_raised_after_the_others_are_done_and_is_on_the_receipt(path, tmp_path):
    receipts = ReceiptStore(tmp_path / "r.sqlite")
    with LLM(str(path), home=tmp_path, backend="reference", kv_memory=8 << 20, receipts=receipts) as llm:
        run = llm.engine.backend.run
        calls = []

        def failing(rows):
            calls.append(rows)
            if len(calls) == 3:
                raise RuntimeError("no")
            run(rows)

        llm.engine.backend.run = failing
        with pytest.raises(EngineFault):
            llm.generate("the thing", params())
        llm.engine.backend.run = run
        assert llm.generate("the thing", params())[0].outputs[0].token_ids
    assert receipts.flush(5)
    statuses = [(receipt.status, receipt.usage.completion_tokens) for receipt in receipts.list(limit=5)]
    assert sorted(statuses) == [("error", 2), ("ok", 12)]
    receipts.close()


@pytest.mark.parametrize("where", ["turn", "run"])
def test_an_interrupt_cancels_and_still_leaves_receipts(path, tmp_path, where):
    receipts = ReceiptStore(tmp_path / "r.sqlite")
    with LLM(str(path), home=tmp_path, backend="reference", kv_memory=8 << 20, receipts=receipts) as llm:
        owner = llm.engine if where == "turn" else llm.engine.backend
        verb, count = getattr(owner, where), []

        def interrupted(*given):
            count.append(1)
            if len(count) == 4:
                raise KeyboardInterrupt
            return verb(*given)

        setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["the thing", "other"], params())
        assert llm.engine.stats().blocks_used == 0
        assert llm.generate("again", params())
    assert receipts.flush(5)
    assert sorted(receipt.status for receipt in receipts.list(limit=5)) == ["cancelled", "cancelled", "ok"]
    receipts.close()


def test_unknown_models_are_named(tmp_path):
    with pytest.raises(ModelNotFound):
        LLM("no-such-model", home=tmp_path)


def refused(call, *args, **more):
    with pytest.raises(InvalidRequest) as caught:
        call(*args, **more)
    return caught.value.param, caught.value.code


def test_wrong_arguments_are_typed_errors_that_name_their_place(llm):
    hi = {"role": "user", "content": "hi"}
    assert refused(llm.generate, "a", {"max_tokens": 2}) == ("params", "invalid_type")
    assert refused(llm.generate, ["a", "b"], [params(), 3]) == ("params[1]", "invalid_type")
    assert refused(llm.generate, ["a", ""], params()) == ("prompts[1]", "invalid_value")
    assert refused(llm.generate, ["a", [5] * 600], params()) == ("prompts[1]", "context_length_exceeded")
    assert refused(llm.generate, ["a", [99999]], params()) == ("prompts[1]", "invalid_value")
    assert refused(llm.chat, [hi], params(), template_kwargs={"messages": []})[0] == "template_kwargs"
    assert refused(llm.chat, [{"role": "function", "content": "x"}])[0] == "messages[0].role"
    missing = ("messages[1][0].content", "missing_required_parameter")
    assert refused(llm.chat, [[hi], [{"role": "user"}]]) == missing
    assert refused(llm.chat, [[hi], "hi"]) == ("messages[1]", "invalid_type")
    assert refused(llm.chat, "hi")[1] == "invalid_type"
    assert refused(llm.chat, []) == ("messages", "empty_array")
    both = refused(llm.generate, "a", params(), sampling_params=params())
    assert both[0] == "sampling_params"


def test_vllms_names_are_there(llm):
    (result,) = llm.generate("the thing", sampling_params=params(max_tokens=3))
    assert len(result.outputs[0].token_ids) == 3
    assert result.finished and result.prompt_logprobs is None
    assert result.num_cached_tokens == result.usage.cached_tokens
    assert len(llm.chat([{"role": "user", "content": "x"}], sampling_params=params())) == 1


def test_developer_is_read_as_system_and_the_receipt_says_so(llm):
    asked = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "x"}]
    (result,) = llm.chat(asked, params())
    as_system = [{"role": "system", "content": "be brief"}, asked[1]]
    assert result.prompt_token_ids == llm.model.template.encode(llm.model.tokenizer, as_system)
    assert result.receipt.clamped == {"messages[0].role": "developer read as system"}


def test_closed_llm_says_so_and_leaves_no_receipt(path, tmp_path, capsys):
    llm = LLM(str(path), home=tmp_path, backend="reference", kv_memory=8 << 20)
    llm.close()
    llm.close()
    assert refused(llm.generate, "a", params()) == (None, "closed")
    assert capsys.readouterr().err == ""


def test_a_structured_output_is_valid_and_noted_by_its_digest(llm):
    pytest.importorskip("llguidance")
    wanted = StructuredOutputs(choice=["yes, certainly", "no"])
    results = llm.generate(["a", "b"], params(ignore_eos=False, max_tokens=40, structured_outputs=wanted))
    for result in results:
        assert result.outputs[0].text in wanted.choice and result.outputs[0].finish_reason == "stop"
        assert set(result.receipt.params["structured_outputs"]) == {"sha256"}
    relaxed = StructuredOutputs(json={"type": "boolean", "not": {"const": True}}, strict=False)
    (result,) = llm.generate("a", params(ignore_eos=False, structured_outputs=relaxed))
    assert result.outputs[0].text in ("true", "false")
    assert result.receipt.clamped == {"structured_outputs.not": "not enforced"}
    for more in ({"ignore_eos": True}, {"min_tokens": 2, "ignore_eos": False}):
        with pytest.raises(InvalidRequest, match="grammar"):
            llm.generate("a", params(structured_outputs=wanted, **more))
    with pytest.raises(InvalidRequest, match="exactly one"):
        llm.generate(
            "a", params(ignore_eos=False, structured_outputs=StructuredOutputs(regex="a", choice=["b"]))
        )


def test_errors_name_the_prompt_even_when_there_is_one(llm):
    for bad, place in (
        (["x" * 5000], "prompts[0]"),
        ("x" * 5000, "prompts[0]"),
        (["a", "x" * 5000], "prompts[1]"),
    ):
        with pytest.raises(ContextLengthExceeded) as caught:
            llm.generate(bad, params())
        assert caught.value.param == place
    one = [{"role": "user", "content": "x" * 5000}]
    for given, place in ((one, "messages"), ([one], "messages[0]")):
        with pytest.raises(ContextLengthExceeded) as caught:
            llm.chat(given, params())
        assert caught.value.param == place


@pytest.mark.parametrize("bad", ["a\x00b", "half \ud800"])
def test_what_is_no_text_is_refused(llm, bad):
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(["fine", bad], params())
    assert caught.value.param == "prompts[1]"
    for content, path in (
        (bad, "messages[1].content"),
        ([{"type": "text", "text": bad}], "messages[1].content[0].text"),
    ):
        turns = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
        with pytest.raises(InvalidRequest) as caught:
            llm.chat(turns, params())
        assert caught.value.param == path


def test_chat_takes_the_results_of_tools(llm):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": "ö"}}}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "42"},
    ]
    (result,) = llm.chat(turns, params())
    text = llm.model.tokenizer.decode(result.prompt_token_ids, skip_special=False)
    assert '{"name": "f", "arguments": {"x": "ö"}}' in text and "<tool_response>\n42" in text
    assert result.receipt.clamped == {"messages": "tool calls and results put in words"}
    spelled = {**call, "function": {"name": "f", "arguments": '{"x": "ö"}'}}
    parts = {**turns[2], "content": [{"type": "text", "text": "42"}]}
    (same,) = llm.chat([turns[0], {**turns[1], "tool_calls": [spelled]}, parts], params())
    assert same.prompt_token_ids == result.prompt_token_ids
    for place, message in (
        ("messages[0].tool_calls", {"role": "user", "content": "x", "tool_calls": [call]}),
        ("messages[0].tool_calls[0].function", {"role": "assistant", "tool_calls": [{"id": "a"}]}),
        (
            "messages[0].tool_calls[0].function.arguments",
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]},
        ),
        ("messages[0].content", {"role": "tool", "content": 7}),
    ):
        with pytest.raises(InvalidRequest) as caught:
            llm.chat([message], params())
        assert caught.value.param == place
