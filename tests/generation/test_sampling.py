"""Sampled answers: the same in any company and order, by the engine and by transformers; the right distribution."""

import random
from collections import Counter

import peft
import pytest
import torch
from generation_helpers import NEW, finish, make_prompts, opened, run, small_blocks, trained, without_stop
from scipy import stats
from tiny import VOCAB, tiny_model, tiny_tokenizer

from llm_adapters.errors import RequestError, WorkError
from llm_adapters.generation import decoding
from llm_adapters.generation.generator import Generator, generate
from llm_adapters.generation.sampling_params import SamplingParams

pytestmark = pytest.mark.usefixtures("functions")

SAMPLING = {"temperature": 1.3, "top_p": 0.95, "top_k": 200, "n": 3, "seed": 5}


def samples(model, prompts, **options):
    """Tokens by (index of the prompt, number of the sample)."""
    answers = generate(model, tiny_tokenizer(), prompts, **{"max_new_tokens": NEW} | SAMPLING | options)
    return {(index, answer.sample): answer.tokens for index, answer in answers}


def tokens_by_definition(model, prompt, params, ends=(2,)):
    """Sampling in its plainest form: the whole text again for every token, transformers' processors, Gumbel's noise."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from llm_adapters.ops.sampling import gumbel

    tokens = []
    with torch.no_grad():
        while len(tokens) < NEW:
            logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[:, -1]
            for kept in (
                TemperatureLogitsWarper(params.temperature),
                TopKLogitsWarper(params.top_k),
                TopPLogitsWarper(params.top_p),
            ):
                logits = kept(None, logits)
            noise = gumbel(torch.tensor([params.seed]), torch.tensor([len(tokens)]), VOCAB)
            following = int((logits[0] + noise).argmax())
            if following in ends:
                break
            tokens.append(following)
    return tuple(tokens)


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "mixtral"])
def test_batch_size_order_and_engine_change_nothing(family):
    model, prompts = tiny_model(family), make_prompts()
    params = SamplingParams(**SAMPLING)
    expected = {
        (index, number): tokens_by_definition(model, prompt, params.sample(prompt, number))
        for index, prompt in enumerate(prompts)
        for number in range(3)
    }
    assert len(set(expected.values())) > 24  # of 27; short ones may be alike
    for options in ({"batch_size": 1}, {"batch_size": 5}, {}, {"own": False, "batch_size": 4}):
        assert samples(model, prompts, **options) == expected
    order = random.Random(2).sample(range(len(prompts)), len(prompts))
    found = samples(model, [prompts[index] for index in order], batch_size=4)
    assert {(order[at], number): tokens for (at, number), tokens in found.items()} == expected
    one = samples(model, prompts[3:4])  # one prompt by itself, and fewer samples
    assert one == {(0, number): expected[3, number] for number in range(3)}
    assert samples(model, prompts[3:4], n=1) == {(0, 0): expected[3, 0]}


def test_another_seed_gives_other_answers_and_the_same_seed_the_same():
    model, prompts = tiny_model("llama"), make_prompts()
    found = samples(model, prompts)
    assert samples(model, prompts) == found
    other = samples(model, prompts, seed=6)
    assert sum(other[key] == tokens for key, tokens in found.items()) < 5


@pytest.mark.parametrize("own", [True, False])
def test_the_first_token_has_the_models_distribution(own):
    model, prompt, count = tiny_model("llama"), [5, 6, 7], 3000
    answers = generate(
        model, tiny_tokenizer(), [prompt], max_new_tokens=1, temperature=0.5, top_k=6, n=count, own=own, batch_size=500
    )
    seen = Counter(answer.tokens[0] if answer.tokens else 2 for _, answer in answers)
    with torch.no_grad():
        best, words = model(input_ids=torch.tensor([prompt])).logits[0, -1].topk(6)
    assert set(seen) <= set(words.tolist())
    expected = (best / 0.5).double().softmax(-1) * count
    assert stats.chisquare([seen[word] for word in words.tolist()], expected.numpy()).pvalue > 1e-4


def test_speculation_changes_no_sampled_answer(monkeypatch):
    small_blocks(monkeypatch)
    monkeypatch.setattr(decoding, "NGRAM_SIZE", 2)
    accepted = []
    advance = decoding.Greedy.advance

    def noted(self, slots, input_tokens, logits):
        before = [self.num_tokens[slot] for slot in slots]
        advance(self, slots, input_tokens, logits)
        if input_tokens.shape[1] > 1:
            accepted.extend(self.num_tokens[slot] - count for slot, count in zip(slots, before, strict=True))

    model, prompts = tiny_model("llama"), make_prompts()
    options = {"max_new_tokens": 48, "temperature": 0.4, "top_k": 2, "top_p": 1.0, "n": 2}
    with monkeypatch.context() as without:
        without.setattr(decoding, "MAX_SPECULATIVE_BATCH", 0)
        expected = samples(model, prompts, **options)
    monkeypatch.setattr(decoding.Greedy, "advance", noted)
    for size in (1, 7):
        assert samples(model, prompts, **options, batch_size=size) == expected
    assert max(accepted) > 1  # some drafts were right, some were wrong
    assert min(accepted) < decoding.NUM_SPECULATIVE_TOKENS


def test_greedy_and_sampled_requests_run_together():
    model, prompts = tiny_model("llama"), make_prompts()
    greedy = run(model, prompts)
    hot, cold = SamplingParams(temperature=1.5, seed=3), SamplingParams(temperature=0.5, top_k=5, seed=3)
    asked = [None, hot, cold, SamplingParams(), hot]
    found = {}
    with opened(model, max_num_seqs=4) as engine:
        requests = [
            (index, params, engine.add(prompt, max_new_tokens=NEW, sampling=params))
            for index, prompt in enumerate(prompts)
            for params in asked
        ]
        found, _ = finish(engine)
    for index, params, request in requests:
        if params is None or params.greedy:
            assert without_stop(found[request]) == greedy[index].tokens
        else:
            with opened(model) as engine:
                alone = engine.add(prompts[index], max_new_tokens=NEW, sampling=params)
                assert finish(engine)[0][alone] == found[request]


def test_a_slot_that_is_taken_again_forgets_what_was_sampled_in_it():
    model, prompts = tiny_model("llama"), make_prompts()
    with Generator(model, tiny_tokenizer(), max_new_tokens=NEW, batch_size=2) as generator:
        list(generator.generate(prompts, **SAMPLING))
        engine = generator._engine
        assert dict(generator.generate(prompts)) == run(model, prompts)
        assert generator._engine is engine
        left = generator.generate(prompts, **SAMPLING)
        next(left)
        left.close()  # cancels the others
        assert {
            (index, answer.sample): answer.tokens for index, answer in generator.generate(prompts, **SAMPLING)
        } == samples(model, prompts)


def test_adapters_by_row_are_sampled_as_alone():
    model = trained(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    prompts = [[7, 8, 9, *prompt] for prompt in make_prompts()]  # a prefix that is shared
    names = ["default" if index % 2 else "__base__" for index in range(len(prompts))]
    found = samples(model, prompts, adapter_names=names)
    for name in ("default", "__base__"):
        rows = [index for index, other in enumerate(names) if other == name]
        alone = samples(model, [prompts[index] for index in rows], adapter_names=[name] * len(rows), own=False)
        assert {(rows[at], number): tokens for (at, number), tokens in alone.items()} == {
            key: tokens for key, tokens in found.items() if key[0] in rows
        }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 is no temperature: give 0"),
        ({"temperature": float("nan")}, "temperature=nan is no temperature"),
        ({"temperature": float("inf")}, "temperature=inf is no temperature"),
        ({"top_p": 0.0}, "top_p=0.0 is no probability above 0"),
        ({"top_p": 1.01}, "top_p=1.01 is no probability"),
        ({"top_k": -1}, "top_k=-1 is out of range"),
        ({"top_k": 2**64}, "top_k=18446744073709551616 is out of range"),
        ({"n": 0}, "0 samples cannot be asked for: give 1 to 16,384"),
        ({"n": 10**9}, "1000000000 samples cannot be asked for"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"temperature": 0, "top_p": 1.0, "top_k": 0, "seed": 0}, "3 samples at temperature 0 would all be the same"),
        ({"temperature": 0, "n": 1, "top_k": 0, "seed": 0}, "do nothing at temperature 0"),
        ({"num_beams": 3}, "temperature=1.3 with num_beams=3: beams are not sampled"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(RequestError, match=words):
        samples(tiny_model("llama"), make_prompts(), **options)


def test_what_an_engine_and_a_stream_refuse():
    model, params = tiny_model("llama"), SamplingParams(**SAMPLING)
    with opened(model) as engine, pytest.raises(RequestError, match="n=3: add a request for each sample"):
        engine.add([5], sampling=params)
    with opened(model, num_beams=2) as engine, pytest.raises(RequestError, match="num_beams=2: beam search does not"):
        engine.add([5], sampling=params.sample([5], 0))
    with (
        Generator(model, tiny_tokenizer()) as generator,
        pytest.raises(RequestError, match="on_token cannot tell 3 answers"),
    ):
        list(generator.generate([[5]], print, **SAMPLING))


def test_a_prompt_that_is_too_long_is_skipped_in_every_sample():
    model, limit = tiny_model("llama"), tiny_model("llama").config.max_position_embeddings
    with Generator(model, tiny_tokenizer(), max_new_tokens=NEW) as generator:
        found = list(generator.generate([[5] * limit, [5]], **SAMPLING))
    assert [(index, answer.sample, answer.finish_reason) for index, answer in found[:3]] == [
        (0, number, "skipped") for number in range(3)
    ]
    assert sorted((index, answer.sample) for index, answer in found[3:]) == [(1, 0), (1, 1), (1, 2)]


def test_a_damaged_model_is_told_in_sampling_too():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    for own in (True, False):
        with pytest.raises(WorkError, match="not numbers"):
            samples(model, [[5, 6]], own=own)


def test_the_seed_of_a_sample_depends_on_seed_prompt_and_number():
    params = SamplingParams(temperature=1.0, n=4, seed=1)
    seeds = [
        params.sample([5, 6], 0).seed,
        params.sample([5, 6], 1).seed,
        params.sample([56], 0).seed,
        params.sample([5, 6, 0], 0).seed,
        SamplingParams(temperature=1.0, n=4, seed=2).sample([5, 6], 0).seed,
    ]
    assert len(set(seeds)) == len(seeds)
    assert SamplingParams(temperature=0.3, top_k=2, seed=1).sample((5, 6), 1).seed == seeds[1]
    assert params.sample([5, 6], 0).n == 1
