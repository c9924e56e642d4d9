import itertools
import random

import peft
import pytest
import torch
from generation_helpers import NEW, make_prompts, reference, run, small_blocks, trained, untied
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, POSITIONS, VOCAB, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from llm_adapters.bottleneck import BottleneckConfig
from llm_adapters.errors import RequestError, WorkError
from llm_adapters.generation import decoding, engine, padded
from llm_adapters.generation import generator as generation
from llm_adapters.generation.generator import Generation, Generator, check_prompts, choose_batch_size, context_limit
from llm_adapters.ops.kv_cache import BLOCK_SIZE, PagedCache

pytestmark = pytest.mark.usefixtures("functions")

PROMPT_LEARNING = {
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_give_what_each_prompt_gives_alone(family):
    model, prompts = untied(family), make_prompts()
    expected = [reference(model, prompt) for prompt in prompts]
    together = run(model, prompts, batch_size=len(prompts))
    assert [together[index].tokens for index in range(len(prompts))] == expected


NAMED = ["llama", "bloom", "gptj", "gpt2", "qwen3", "mixtral"]
OWN_ATTENTION = ["bloom", "gptj", "gpt_neo", "falcon", "mpt"]  # in the place of whose own code the engine's is


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("family", NAMED)
def test_batch_size_and_order_change_nothing(family, num_beams):
    model, prompts = untied(family), make_prompts()
    expected = run(model, prompts, batch_size=1, num_beams=num_beams)
    for size in (3, 7, len(prompts), None):
        assert run(model, prompts, batch_size=size, num_beams=num_beams) == expected
    order = list(range(len(prompts)))
    random.Random(2).shuffle(order)
    shuffled = run(model, [prompts[index] for index in order], batch_size=4, num_beams=num_beams)
    assert {order[at]: answer for at, answer in shuffled.items()} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_takes_every_family(family):
    with Generator(tiny_model(family), tiny_tokenizer()) as generator:
        assert generator.report["engine"] == "own", generator.report


def by_transformers(model, prompts, num_beams, new, ends):
    """transformers' own `generate`, one prompt at a time, cut before the end."""
    config = GenerationConfig(
        max_new_tokens=new, num_beams=num_beams, do_sample=False, pad_token_id=0, eos_token_id=list(ends)
    )
    answers = []
    for prompt in prompts:
        tokens = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        answers.append(tuple(tokens[:stop]))
    return answers


@pytest.mark.parametrize(
    ("family", "num_beams"),
    [*itertools.product(NAMED, (1, 4)), *((family, 1) for family in ("gemma2", "gpt_neo", "falcon", "mpt"))],
)
def test_equal_to_transformers_alone(family, num_beams):
    model, prompts = untied(family), make_prompts()
    # Ends that do occur, so that answers end anywhere, and free places are taken again.
    free = by_transformers(model, prompts, num_beams, 24, {2})
    ends = {2, *(free[at][5 * at % 20] for at in (0, 1, 2, 3, 5, 7))}
    model.generation_config.eos_token_id = sorted(ends)
    expected = by_transformers(model, prompts, num_beams, 24, ends)
    assert len({len(answer) for answer in expected}) > 1
    answers = run(model, prompts, batch_size=3, num_beams=num_beams, max_new_tokens=24)
    assert [answers[index].tokens for index in range(len(prompts))] == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mixtral", "mistral", "bloom", "gptj"])
def test_speculation_changes_no_answer(family, monkeypatch):
    small_blocks(monkeypatch)
    monkeypatch.setattr(decoding, "NGRAM_SIZE", 2)
    accepted = []
    advance = decoding.Greedy.advance

    def noted(self, slots, input_tokens, logits):
        before = [self.num_tokens[slot] for slot in slots]
        advance(self, slots, input_tokens, logits)
        if input_tokens.shape[1] > 1:
            accepted.extend(self.num_tokens[slot] - count for slot, count in zip(slots, before, strict=True))

    monkeypatch.setattr(decoding.Greedy, "advance", noted)
    model, prompts, new = tiny_model(family), make_prompts(), 61
    # An end that stands late in an answer, and so among the drafts.
    free = by_transformers(model, prompts, 1, new, {2})
    ends = {2, next(token for token in reversed(free[0]) if token not in free[0][:20])} if family == "gpt2" else {2}
    model.generation_config.eos_token_id = sorted(ends)
    expected = by_transformers(model, prompts, 1, new, ends)
    for size in (1, 4, 9):
        accepted.clear()
        answers = run(model, prompts, batch_size=size, max_new_tokens=new)
        assert [answers[index].tokens for index in range(len(prompts))] == expected
        # Some drafts were right, some were wrong.
        assert max(accepted) == decoding.NUM_SPECULATIVE_TOKENS + 1
        assert min(accepted) < decoding.NUM_SPECULATIVE_TOKENS


@given(
    answers=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=4),
    repeated=st.integers(1, 4),
)
def test_the_nearest_repetition_is_found(answers, repeated):
    tokens = torch.full((len(answers), 20), 9)
    for row, answer in zip(tokens, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "NGRAM_SIZE", repeated)
        found = decoding._ngram_period(tokens, list(map(len, answers)))[:, 0].tolist()
    for answer, period in zip(answers, found, strict=True):
        fitting = [
            back
            for back in range(1, len(answer) - repeated + 1)
            if answer[-repeated:] == answer[len(answer) - repeated - back : len(answer) - back]
        ]
        assert period == min(fitting, default=0)


@pytest.mark.parametrize(
    ("family", "num_beams"), [("llama", 4), ("bloom", 4), *((f, 1) for f in ("llama", "gemma2", *OWN_ATTENTION))]
)
def test_answers_of_many_blocks_and_prompts_that_begin_alike(family, num_beams, monkeypatch):
    small_blocks(monkeypatch)
    monkeypatch.setattr(engine, "MAX_PREFILL_TOKENS", 20)
    window = {"gemma2": {"sliding_window": 8}, "gpt_neo": {"window_size": 8}}.get(family, {})
    model = tiny_model(family, tie_word_embeddings=False, **window)
    prompts = [[7, 8, 9, 10, 11, *prompt] for prompt in make_prompts()]
    ends = {2, *range(3, 300, 40)} if num_beams == 1 else {2, 60}
    model.generation_config.eos_token_id = sorted(ends)
    expected = by_transformers(model, prompts, num_beams, 30, ends)
    for size in (1, 2, 5, 9):
        answers = run(model, prompts, batch_size=size, num_beams=num_beams, max_new_tokens=30)
        assert [answers[index].tokens for index in range(len(prompts))] == expected


@pytest.mark.proves("engine")
@pytest.mark.parametrize("method", ["series", "parallel", "lora"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gptj"])
def test_adapters_on_the_engine_equal_transformers(family, method):
    configs = {
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.1),
        "series": BottleneckConfig(insertion="series", bottleneck_size=8, task_type="CAUSAL_LM"),
        "parallel": BottleneckConfig(insertion="parallel", bottleneck_size=8, task_type="CAUSAL_LM"),
    }
    model, prompts = trained(untied(family), configs[method]), make_prompts()
    expected = run(model, prompts, own=False)
    assert run(model, prompts) == expected
    assert run(model, prompts, merge=False) == expected
    with Generator(model, tiny_tokenizer()) as generator:
        assert generator.report["fast_paths"].get("LoRA merged", "").startswith("on") == (method == "lora")
    base = run(untied(family), prompts)
    assert expected != base


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_one_token_answers_and_empty_ones(family, num_beams):
    model, prompts = tiny_model(family), make_prompts()
    answers = run(model, prompts, max_new_tokens=1, num_beams=num_beams, batch_size=4)
    assert {len(answer.tokens) + answer.finished for answer in answers.values()} == {1}
    model.generation_config.eos_token_id = list(range(VOCAB))
    answers = run(model, prompts, batch_size=4)
    assert {(answer.text, answer.tokens, answer.finished) for answer in answers.values()} == {("", (), True)}


def test_tokens_are_told_as_they_come():
    model, prompts = tiny_model("llama"), make_prompts()
    for own in (True, False):
        told = {index: [] for index in range(len(prompts))}
        with Generator(model, tiny_tokenizer(), max_new_tokens=NEW, batch_size=3, own=own) as generator:
            answers = dict(generator.generate(prompts, lambda index, token, told=told: told[index].append(token)))
        assert {index: tuple(tokens) for index, tokens in told.items()} == {
            index: answer.tokens + (2,) * answer.finished for index, answer in answers.items()
        }


def test_blocks_are_reused_moved_down_and_given_back():
    cache = PagedCache(4, 3 * BLOCK_SIZE, torch.device("cpu"))
    for slot in range(4):
        cache.reserve(slot, 2 * BLOCK_SIZE + 1)
    keys, _ = cache.layer(0, torch.zeros(2, 1, 8), torch.zeros(2, 1, 8))
    for slot in range(4):
        keys[cache.block_table[slot]] = float(slot + 1)
    used = cache.num_used_blocks
    cache.release(1)
    cache.reserve(1, 1)
    assert cache.num_used_blocks == used
    keys[cache.block_table[1, 0]] = 9.0
    cache.release(0)
    cache.release(2)
    cache.compact()
    assert cache.num_used_blocks == 8  # the null block, one block and three, rounded
    assert int(cache.block_table.max()) < 5
    assert {float(keys[block].mean()) for block in cache.block_table[3].tolist()} == {4.0}
    assert float(keys[cache.block_table[1, 0]].mean()) == 9.0
    assert set(cache.block_owner[: cache.num_used_blocks].tolist()) == {-1, 1, 3}


@pytest.mark.parametrize("method", PROMPT_LEARNING)
@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "gpt2"])
def test_learned_prompts_stand_right_before_the_padded_prompt(family, method):
    model = trained(untied(family), PROMPT_LEARNING[method])
    prompts = make_prompts()
    expected = [reference(model, prompt) for prompt in prompts]
    answers = run(model, prompts, batch_size=4)
    assert [answers[index].tokens for index in range(len(prompts))] == expected
    with Generator(model, tiny_tokenizer()) as generator:
        # A learned prefix lies in the engine's cache.
        assert (generator.report["engine"] == "own") == (method == "prefix")


@pytest.mark.proves("engine", method="prefix")
@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("family", ["llama", "bloom", "gptj"])
def test_a_learned_prefix_before_prompts_that_begin_alike(family, num_beams):
    model = trained(untied(family), PROMPT_LEARNING["prefix"])
    prompts = [[7, 8, 9, *prompt] for prompt in make_prompts()]
    expected = run(model, prompts, own=False, batch_size=1, num_beams=num_beams)
    for size in (1, 4):
        assert run(model, prompts, batch_size=size, num_beams=num_beams) == expected
    assert run(model, prompts[:1], num_beams=num_beams) == {0: expected[0]}


def test_an_adapter_takes_part_and_its_dropout_does_not():
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.5)
    base, prompts = tiny_model("llama"), make_prompts()
    without = run(base, prompts)
    model = trained(base, config)
    expected = [reference(model, prompt) for prompt in prompts]
    model.train()
    answers = run(model, prompts, batch_size=3)
    assert [answers[index].tokens for index in range(len(prompts))] == expected
    assert answers != without
    assert model.training
    assert any(isinstance(module, torch.nn.Dropout) and module.training for module in model.modules())


def test_an_answer_ends_at_any_end_token_of_the_checkpoint():
    model, prompts = tiny_model("llama"), make_prompts()
    free = {index: reference(model, prompt, ends=()) for index, prompt in enumerate(prompts)}
    model.generation_config.eos_token_id = [free[0][3], free[1][0]]
    ends = {2, *model.generation_config.eos_token_id}
    answers = run(model, prompts, batch_size=4)
    for index, answer in answers.items():
        stop = next((at for at, token in enumerate(free[index]) if token in ends), None)
        assert answer.tokens == free[index][:stop]
        assert answer.finished == (stop is not None)
        assert answer.computed == (NEW if stop is None else stop + 1)
    assert answers[1] == Generation("", (), "stop")


def test_the_wishes_of_a_checkpoint_for_generation_take_no_part():
    model, prompts = tiny_model("llama"), make_prompts()
    expected = run(model, prompts)
    model.generation_config = wishes = GenerationConfig(
        repetition_penalty=5.0,
        min_new_tokens=5,
        no_repeat_ngram_size=1,
        do_sample=True,
        temperature=3.0,
        eos_token_id=2,
    )
    assert run(model, prompts) == expected
    assert model.generation_config is wishes


def test_text_is_what_the_tokens_spell():
    answer = run(tiny_model("llama"), make_prompts())[0]
    assert answer.tokens
    assert answer.text == tiny_tokenizer().decode(answer.tokens)


def test_padded_batches_have_their_size_and_the_longest_prompts_come_first(monkeypatch):
    sizes = []
    original = padded.generate_batch

    def spy(model, prompts, **options):
        sizes.append(list(map(len, prompts)))
        return original(model, prompts, **options)

    monkeypatch.setattr(padded, "generate_batch", spy)
    run(tiny_model("llama"), make_prompts(), batch_size=4, own=False)
    assert sizes == [[40, 33, 26, 26], [17, 9, 5, 2], [1]]


@pytest.mark.parametrize("own", [True, False])
def test_a_batch_that_does_not_fit_is_halved(monkeypatch, caplog, own):
    generate_batch, grow = padded.generate_batch, PagedCache.grow

    def few(model, prompts, **options):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("no room")
        return generate_batch(model, prompts, **options)

    def small(cache, num_seqs, *rest):
        if num_seqs > 2:
            raise torch.OutOfMemoryError("no room")
        grow(cache, num_seqs, *rest)

    model, prompts = tiny_model("llama"), make_prompts()
    expected = run(model, prompts)
    monkeypatch.setattr(padded, "generate_batch", few)
    with Generator(model, tiny_tokenizer(), max_new_tokens=NEW, batch_size=8, own=own) as generator:
        monkeypatch.setattr(PagedCache, "grow", small)
        assert dict(generator.generate(prompts)) == expected
    assert "going on with 2" in caplog.text


def test_prompts_as_long_as_the_limit_are_asked_and_longer_ones_are_not():
    model = tiny_model("llama")
    room = POSITIONS - NEW
    answers = run(model, [[5] * (room + 1), [5] * room, [5, 6]])
    assert answers[0] == Generation(finish_reason="skipped")
    assert not answers[1].skipped
    assert not answers[2].skipped


def test_learned_prompts_take_room():
    model = tiny_model("llama")
    assert context_limit(model) == POSITIONS
    assert context_limit(trained(model, PROMPT_LEARNING["prefix"])) == POSITIONS - 5
    assert context_limit(tiny_model("bloom")) > 1_000_000


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[5] * POSITIONS, [5] * (POSITIONS + 1)], {}, f"shortest has {POSITIONS} tokens.*leaves {POSITIONS - NEW}"),
        ([[5], []], {}, "prompt 1 is empty"),
        ([[VOCAB]], {}, f"token {VOCAB}, and the model has {VOCAB}"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[5]], {"batch_size": 0}, "batch_size=0"),
        ([[5]], {"num_beams": 0}, "num_beams=0"),
    ],
)
def test_requests_that_cannot_be_met(prompts, options, words):
    with pytest.raises(RequestError, match=words):
        run(tiny_model("llama"), prompts, **options)


def test_no_prompts_give_no_answers():
    assert run(tiny_model("llama"), []) == {}
    assert check_prompts(tiny_model("llama"), [], NEW) == set()


def test_a_damaged_model_is_told_from_a_wrong_answer():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    wishes = model.generation_config
    with pytest.raises(WorkError, match="not numbers"):
        run(model, [[5, 6]])
    assert model.generation_config is wishes


def test_batch_size_follows_memory(monkeypatch):
    model = tiny_model("llama")
    assert choose_batch_size(model, [10, 300], 100) == generation.LARGEST_BATCH
    assert choose_batch_size(model, [10, 300], 100, num_beams=4) == generation.LARGEST_BATCH // 4
    # A row: keys and values, 2 layers, 2 heads of 8 numbers of 4 bytes, 400 tokens; and 16 bytes for each of 304 words.
    row = 2 * 2 * 2 * 8 * 4 * 400 + 16 * VOCAB
    monkeypatch.setattr(generation, "free_memory", lambda device: 2 * 5 * row)
    assert choose_batch_size(model, [10, 300], 100) == 5
    monkeypatch.setattr(generation, "free_memory", lambda device: 10)
    assert choose_batch_size(model, [10, 300], 100) == 1
