"""The engine itself: requests at any time, cancelled ones, adapters, prefixes, and a cache that grows and is kept."""

import random

import peft
import pytest
import torch
from generation_helpers import NEW, finish, make_prompts, opened, reference, run, small_blocks, trained, without_stop
from tiny import tiny_model, tiny_tokenizer

from llm_adapters.errors import RequestError, WorkError
from llm_adapters.fast_paths.routing import using
from llm_adapters.generation import engine as engines
from llm_adapters.generation.generator import Generator
from llm_adapters.ops.kv_cache import PagedCache

pytestmark = pytest.mark.usefixtures("functions")

LORA = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])


def storage(cache):
    return [part.data_ptr() for pair in cache.layers.values() for part in pair]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_requests_come_while_others_run(num_beams):
    model, prompts = tiny_model("llama"), make_prompts()
    expected = run(model, prompts, batch_size=1, num_beams=num_beams)
    with opened(model, num_beams=num_beams, max_num_seqs=3) as engine:
        found, requests = {}, []
        for prompt in prompts:
            requests.append(engine.add(prompt, max_new_tokens=NEW))
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
        finish(engine, found)
    assert [without_stop(found[request]) for request in requests] == [expected[i].tokens for i in range(len(prompts))]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_finish_reasons_and_a_limit_for_each_request(num_beams):
    model, prompt = tiny_model("llama"), make_prompts()[0]
    free = run(model, [prompt], num_beams=num_beams, own=False)[0].tokens
    assert len(free) == NEW
    with opened(model, num_beams=num_beams) as engine:
        short, long = (engine.add(prompt, max_new_tokens=limit) for limit in (3, NEW))
        found, reasons = finish(engine)
    assert reasons == {short: "length", long: "length"}
    assert (len(found[short]), tuple(found[long])) == (3, free)
    if num_beams == 1:
        assert tuple(found[short]) == free[:3]
        stop = free[4]
        with opened(model, [stop]) as engine:
            request = engine.add(prompt, max_new_tokens=NEW)
            found, reasons = finish(engine)
        assert reasons == {request: "stop"}
        assert tuple(found[request]) == free[: free.index(stop) + 1]


def test_what_is_cancelled_brings_nothing_more_and_frees_its_place():
    model, prompts = tiny_model("llama"), make_prompts()
    with opened(model, max_num_seqs=2) as engine:
        requests = [engine.add(prompt, max_new_tokens=NEW) for prompt in prompts[:4]]
        assert {output.request_id for output in engine.step()} == set(requests[:2])
        engine.cancel(requests[0])  # running
        engine.cancel(requests[3])  # waiting
        assert {output.request_id for output in engine.step()} == {requests[1], requests[2]}
        _, reasons = finish(engine)
        engine.cancel(requests[1])  # has ended
        assert set(reasons) == {requests[1], requests[2]}
        assert not engine.has_unfinished
        assert engine.step() == []
        again = engine.add(prompts[0], max_new_tokens=NEW)
        assert without_stop(finish(engine)[0][again]) == reference(model, prompts[0])


def test_the_order_of_requests_changes_no_answer():
    model, prompts = tiny_model("llama"), make_prompts()
    expected = [reference(model, prompt) for prompt in prompts]
    for seed in range(3):
        order = random.Random(seed).sample(range(len(prompts)), len(prompts))
        with opened(model, max_num_seqs=4) as engine:
            requests = {engine.add(prompts[index], max_new_tokens=NEW): index for index in order}
            found, _ = finish(engine)
        assert {requests[request]: without_stop(tokens) for request, tokens in found.items()} == dict(
            enumerate(expected)
        )


def test_a_request_of_another_adapter_comes_later():
    model = trained(tiny_model("llama"), LORA)
    model.add_adapter(
        "other", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], init_lora_weights=False)
    )
    prompt, expected = make_prompts()[1], {}
    for name in ("default", "other", "__base__"):
        with using(model, name):
            expected[name] = reference(model, prompt)
    assert len(set(expected.values())) == 3
    with opened(model, adapters=["default", "other", "__base__"]) as engine:
        engine.set_prefix(prompt[:4])
        requests, found = {"default": engine.add(prompt, adapter="default", max_new_tokens=NEW)}, {}
        for name in ("other", None):
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
            requests[name or "__base__"] = engine.add(prompt, adapter=name, max_new_tokens=NEW)
        finish(engine, found)
        with pytest.raises(RequestError, match="unknown adapter 'mine': choose one of"):
            engine.add(prompt, adapter="mine")
    assert {name: without_stop(found[request]) for name, request in requests.items()} == expected


def test_the_cache_grows_with_longer_and_with_more_requests(monkeypatch):
    small_blocks(monkeypatch)
    model, prompts = tiny_model("llama"), make_prompts()
    with opened(model) as engine:
        found, requests, sizes = {}, [], []
        for prompt in sorted(prompts, key=len):
            requests.append((engine.add(prompt, max_new_tokens=NEW), prompt))
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
            sizes.append(engine.cache.num_bytes)
        finish(engine, found)
        assert sizes == sorted(sizes)
        assert len(set(sizes)) > 2
        for request, prompt in requests:
            assert without_stop(found[request]) == reference(model, prompt)


def test_what_a_cache_holds_stays_when_it_grows():
    cache = PagedCache(1, 64, torch.device("cpu"))
    cache.reserve(0, 64)
    keys, _ = cache.layer(0, torch.zeros(2, 1, 8), torch.zeros(2, 1, 8))
    keys[cache.block_table[0]] = 3.0
    cache.grow(5, 130, 15)
    cache.reserve(4, 130)
    larger, _ = cache.layers[0]
    assert cache.block_table.shape == (5, 3)
    assert len(larger) >= 16
    assert (larger[cache.block_table[0, 0]] == 3).all()
    assert (larger[cache.block_table[4]] == 0).all()
    assert cache.blocks_of(4) == cache.block_table[4].tolist()


def test_prompts_that_do_not_begin_with_the_prefix_are_answered_too():
    model, prompts = tiny_model("llama"), make_prompts()
    shared = [[7, 8, 9, *prompt] for prompt in prompts]
    with opened(model) as engine:
        engine.set_prefix([7, 8, 9])
        found, order = {}, [shared[0], prompts[1], shared[2], [7, 8, 9], prompts[3]]
        requests = []
        for prompt in order:
            requests.append(engine.add(prompt, max_new_tokens=NEW))
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
        with pytest.raises(RequestError, match="cannot change while 1 requests are running"):
            engine.set_prefix([7])
        finish(engine, found)
        engine.set_prefix([7])
    assert [without_stop(found[request]) for request in requests] == [reference(model, prompt) for prompt in order]


def test_a_generator_keeps_its_engine_and_cache():
    model, prompts = tiny_model("llama"), make_prompts()
    with Generator(model, tiny_tokenizer(), max_new_tokens=NEW) as generator:
        found = [dict(generator.generate([prompts[7]]))[0]]
        engine, before = generator._engine, storage(generator._engine.cache)
        for prompt in (prompts[1], prompts[3]):
            found.append(dict(generator.generate([prompt]))[0])
        assert generator._engine is engine
        assert storage(engine.cache) == before
        assert engine.cache.num_used_blocks == 1  # nothing but the null block
    assert before
    assert [answer.tokens for answer in found] == [reference(model, prompts[index]) for index in (7, 1, 3)]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_calls_of_a_generator_equal_fresh_ones(num_beams, monkeypatch):
    small_blocks(monkeypatch)
    model, prompts = tiny_model("llama"), make_prompts()
    shared = [[7, 8, 9, *prompt] for prompt in prompts]
    calls = [shared, shared[:2], prompts, prompts[:1], shared[3:4], [[7, 8, 9, 10, *p] for p in prompts], prompts]
    with Generator(model, tiny_tokenizer(), max_new_tokens=NEW, num_beams=num_beams, batch_size=4) as generator:
        for number, call in enumerate(calls):
            generator.max_new_tokens = NEW + number
            expected = run(model, call, num_beams=num_beams, batch_size=4, max_new_tokens=NEW + number)
            assert dict(generator.generate(call)) == expected


def test_a_prefix_is_computed_once_for_calls_that_begin_alike(monkeypatch):
    computed, forward_logits = [], engines.forward_logits

    def noted(fast_paths, batch, tokens):
        if batch.prefills is not None and batch.prefill_seqs is None:
            computed.append(batch.prefills.end)
        return forward_logits(fast_paths, batch, tokens)

    monkeypatch.setattr(engines, "forward_logits", noted)
    shared = [[7, 8, 9, *prompt] for prompt in make_prompts()]
    with Generator(tiny_model("llama"), tiny_tokenizer(), max_new_tokens=NEW) as generator:
        for call in (shared, shared[:3], shared[4:5], shared[2:]):
            dict(generator.generate(call))
        assert computed == [3]
        dict(generator.generate([[7, 8, 5], [7, 8, 6]]))
    assert computed == [3, 2]


def test_an_iterator_that_is_left_and_two_at_a_time():
    model, prompts = tiny_model("llama"), make_prompts()
    expected = run(model, prompts)
    with Generator(model, tiny_tokenizer(), max_new_tokens=NEW, batch_size=2) as generator:
        one, other = generator.generate(prompts), generator.generate(prompts)
        found = dict([next(one)])
        assert dict(other) == expected
        assert found | dict(one) == expected
        left = generator.generate(prompts)
        next(left)
        left.close()
        assert not generator._engine.has_unfinished
        assert dict(generator.generate(prompts)) == expected


def test_a_generator_goes_on_after_an_error():
    model, prompts = tiny_model("llama"), make_prompts()
    expected = run(model, prompts)
    with Generator(model, tiny_tokenizer(), max_new_tokens=NEW, merge=False) as generator:
        weight = model.model.norm.weight.data
        value = float(weight[3])
        weight[3] = float("nan")
        with pytest.raises(WorkError, match="not numbers"):
            list(generator.generate(prompts))
        weight[3] = value
        assert dict(generator.generate(prompts)) == expected


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_prompt_that_several_requests_have_is_computed_once(num_beams, monkeypatch):
    small_blocks(monkeypatch)
    computed, forward_logits = [], engines.forward_logits

    def noted(fast_paths, batch, tokens):
        if batch.prefills is not None:
            computed.append(batch.prefills.lengths)
        return forward_logits(fast_paths, batch, tokens)

    model, prompts = tiny_model("llama"), make_prompts()
    one, other = prompts[1], prompts[2]
    monkeypatch.setattr(engines, "forward_logits", noted)
    monkeypatch.setattr(engines, "MAX_PREFILL_TOKENS", len(one) + len(other))
    expected = {tuple(prompt): run(model, [prompt], num_beams=num_beams)[0].tokens for prompt in (one, other)}
    del computed[:]
    asked = [one, one, one, other, one, other]
    with opened(model, num_beams=num_beams, max_num_seqs=5) as engine:
        requests = [engine.add(prompt, max_new_tokens=NEW - at % 2) for at, prompt in enumerate(asked)]
        found, _ = finish(engine)
    # What comes again right after itself costs nothing; the fifth does not fit beside the two, the sixth has no slot.
    assert computed[0] == (len(one), len(other))
    assert sum(map(len, computed)) == 4
    for at, (request, prompt) in enumerate(zip(requests, asked, strict=True)):
        if num_beams == 1 or at % 2 == 0:
            assert without_stop(found[request]) == expected[tuple(prompt)][: NEW - at % 2]


def test_requests_of_an_engine_are_checked():
    with opened(tiny_model("llama")) as engine:
        with pytest.raises(RequestError, match="the prompt is empty"):
            engine.add([])
        with pytest.raises(RequestError, match="max_new_tokens=0 is too small"):
            engine.add([5], max_new_tokens=0)
        with pytest.raises(RequestError, match="adapter='mine' is named, and the engine has no adapters"):
            engine.add([5], adapter="mine")
    with (
        opened(trained(tiny_model("llama"), LORA), adapters=["default"]) as engine,
        pytest.raises(RequestError, match="unknown adapter '__base__': choose one of default"),
    ):
        engine.add([5])
