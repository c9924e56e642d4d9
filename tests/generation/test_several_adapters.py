"""Several adapters of one model answer in one batch, or where that cannot be, one after the other."""

import copy

import peft
import pytest
import torch
from generation_helpers import NEW, make_prompts, reference, run, trained, untied
from tiny import tiny_model, tiny_tokenizer

from llm_adapters.bottleneck import BottleneckConfig
from llm_adapters.errors import RequestError
from llm_adapters.fast_paths import FastPaths
from llm_adapters.fast_paths.routing import using
from llm_adapters.generation.generator import Generator

pytestmark = pytest.mark.usefixtures("functions")

LORA = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
ROUTED = {
    "lora": [LORA, peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["up_proj", "down_proj", "q_proj"])],
    "series": [BottleneckConfig(insertion="series", placement=("mlp",), bottleneck_size=4)] * 2,
    "different": [
        BottleneckConfig(insertion="parallel", placement=("mlp",), bottleneck_size=4),
        BottleneckConfig(insertion="series", placement=("attention", "mlp"), bottleneck_size=6, non_linearity="gelu"),
    ],
}
TUNED = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
ONE_BY_ONE = {  # what cannot be in one batch, and why
    "dora": ([LORA, peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj"])], "more than two"),
    "ia3": ([peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])] * 2, "IA3 cannot"),
    "head": ([LORA, peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])], "own copy of a module"),
    "prefix": ([peft.PrefixTuningConfig(**TUNED)] * 2, "PREFIX_TUNING cannot"),
    "prompt": ([peft.PromptTuningConfig(**TUNED)] * 2, "tokens before the sequence"),
    "llama-adapter": ([peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1)] * 2, "ADAPTION_PROMPT cannot"),
    "mam": ([BottleneckConfig(insertion="parallel", placement=("mlp",), prefix_length=3)] * 2, "has a prefix"),
}


def with_two(configs, family="llama"):
    """A model with two adapters, "default" and "other", none at its start."""
    torch.manual_seed(0)  # PEFT draws its initial weights
    model = trained(untied(family), configs[0])
    model.add_adapter("other", copy.deepcopy(configs[1]))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".other" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def by_adapter(model, prompts, names):
    """What `reference` answers, each prompt with its adapter alone."""
    found = {}
    for index, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        with using(model, name):
            found[index] = reference(model, prompt)
    return found


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("shared", [0, 7])
@pytest.mark.parametrize("method", ROUTED)
def test_every_prompt_is_answered_by_its_adapter_in_one_batch(method, shared, batch_size):
    model = with_two(ROUTED[method])
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    prompts = [[7] * shared + prompt for prompt in make_prompts()]
    names = [("default", "other", "__base__")[index % 3] for index in range(len(prompts))]
    expected = by_adapter(model, prompts, names)
    for index, answer in run(model, prompts, adapter_names=names, batch_size=batch_size).items():
        assert answer.tokens == expected[index]
    with Generator(
        model, tiny_tokenizer(), max_new_tokens=NEW, batch_size=batch_size, adapters=sorted(set(names))
    ) as generator:
        assert generator.report["engine"] == "own"
        found = dict(generator.generate(prompts, adapter_names=names))
    assert {index: answer.tokens for index, answer in found.items()} == expected
    assert len(set(expected.values())) > 1
    assert model.active_adapters == ["default"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert by_adapter(model, prompts[:3], names[:3]) == {index: expected[index] for index in range(3)}


@pytest.mark.parametrize(
    ("family", "method"),
    [("bloom", "lora"), ("bloom", "different"), ("gptj", "lora"), ("gptj", "different"), ("falcon", "different")],
)
def test_rows_of_other_families_have_their_adapters(family, method):
    lora = [peft.LoraConfig(task_type="CAUSAL_LM", r=r, target_modules="all-linear") for r in (2, 3)]
    model = with_two(lora if method == "lora" else ROUTED[method], family)
    prompts = [[7] * 3 + prompt for prompt in make_prompts()]
    names = [("default", "other", "__base__")[index % 3] for index in range(len(prompts))]
    expected = by_adapter(model, prompts, names)
    with Generator(model, tiny_tokenizer(), max_new_tokens=NEW, batch_size=4, adapters=sorted(set(names))) as generator:
        assert generator.report["engine"] == "own", generator.report
        found = dict(generator.generate(prompts, adapter_names=names))
    assert {index: answer.tokens for index, answer in found.items()} == expected


@pytest.mark.parametrize("method", ONE_BY_ONE)
def test_adapters_that_cannot_be_in_one_batch_answer_one_after_the_other(method):
    configs, words = ONE_BY_ONE[method]
    model = with_two(configs)
    prompts = make_prompts()
    names = [("default", "other", "__base__")[index % 3] for index in range(len(prompts))]
    expected = by_adapter(model, prompts, names)
    with Generator(model, tiny_tokenizer(), adapters=sorted(set(names))) as generator:
        assert words in generator.report["reason"]
    found = run(model, prompts, adapter_names=names)
    assert {index: answer.tokens for index, answer in found.items()} == expected
    if method not in ("ia3", "llama-adapter"):  # which start as nothing, and stay nearly so
        other = by_adapter(model, prompts, [names[(index + 1) % 3] for index in range(len(prompts))])
        assert other != expected


@pytest.mark.parametrize("method", ROUTED)
def test_rows_of_several_adapters_in_bfloat16(method):
    """Weights in blocks, and the kernel on pairs: rounding brings them no further from float32 than the model's own."""
    model = with_two(ROUTED[method]).to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    names, ids = ["other", "__base__", "default"], torch.tensor([make_prompts()[2]])
    with FastPaths(model, inference=True, adapters=names) as fast, torch.no_grad():
        assert fast.packs
        found = []
        for number in range(3):
            fast.use_adapter(number, ids.shape[1])
            found.append(fast.base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    for name, rows in zip(names, found, strict=True):
        with using(model, name), using(exact, name), torch.no_grad():
            own, expected = (
                adapted.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state[0].float()
                for adapted in (model, exact)
            )
        assert (rows.float() - expected).norm() <= 1.5 * (own - expected).norm()
    assert all((found[0] - other).norm() > 0.1 * other.norm() for other in found[1:])


def test_several_adapters_are_for_generation():
    with pytest.raises(RequestError, match="are for generation: give inference=True"):
        FastPaths(with_two(ROUTED["lora"]), adapters=["default", "other"])


def test_layers_are_told_for_the_rows_that_there_are():
    model = with_two(ROUTED["series"])
    with FastPaths(model, inference=True, adapters=["default", "other"]) as fast, torch.no_grad():
        fast.use_adapter(1, 6)
        fast.base(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]]))
        with pytest.raises(RuntimeError, match="adapters were set for 6 rows, and there are 4"):
            fast.base(input_ids=torch.tensor([[5, 6, 7, 8]]))


def test_a_generator_of_several_adapters_is_told_which():
    model, prompts = with_two(ROUTED["lora"]), make_prompts()
    with Generator(model, tiny_tokenizer(), adapters=["default", "other"]) as generator:
        with pytest.raises(RequestError, match="give adapter_names, one for each prompt"):
            list(generator.generate(prompts))
        with pytest.raises(RequestError, match="unknown adapter '__base__': choose one of default, other"):
            list(generator.generate(prompts, adapter_names=["__base__"] * len(prompts)))
    with (
        Generator(model, tiny_tokenizer()) as generator,
        pytest.raises(RequestError, match="the Generator has no adapters"),
    ):
        list(generator.generate(prompts, adapter_names=["other"] * len(prompts)))
    with (
        Generator(with_two(ONE_BY_ONE["dora"][0]), tiny_tokenizer(), adapters=["default", "other"]) as generator,
        pytest.raises(RequestError, match="cannot answer in one batch: a LoRA is more than"),
    ):
        list(generator.generate(prompts, adapter_names=["other"] * len(prompts)))


def test_a_generator_wants_adapters_that_there_are():
    with pytest.raises(RequestError, match="unknown adapter 'mine': choose one of __base__, default, other"):
        Generator(with_two(ROUTED["lora"]), tiny_tokenizer(), adapters=["mine"])


def test_beams_have_their_adapter():
    model, prompts = with_two(ROUTED["lora"]), make_prompts()
    names = [("default", "other")[index % 2] for index in range(len(prompts))]
    with Generator(model, tiny_tokenizer(), max_new_tokens=NEW, num_beams=3, adapters=["default", "other"]) as both:
        found = dict(both.generate(prompts, adapter_names=names))
    for name in set(names):
        with using(model, name):
            alone = run(model, prompts, num_beams=3)
        assert all(found[index].tokens == alone[index].tokens for index in found if names[index] == name)


def test_more_adapters_than_slots_and_one_that_nothing_asks_for():
    model, prompts = with_two(ROUTED["lora"]), make_prompts()
    for number in range(3):
        model.add_adapter(f"more{number}", copy.deepcopy(LORA))
    names = ["other", *["more1"] * (len(prompts) - 1)]
    with Generator(
        model, tiny_tokenizer(), max_new_tokens=NEW, batch_size=1, adapters=["more0", *model.peft_config]
    ) as generator:
        found = dict(generator.generate(prompts, adapter_names=names))
    assert {index: answer.tokens for index, answer in found.items()} == by_adapter(model, prompts, names)


def test_adapter_names_are_checked():
    model = trained(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(RequestError, match="2 adapter_names for 9 prompts"):
        run(model, make_prompts(), adapter_names=["default"] * 2)
    with pytest.raises(RequestError, match="unknown adapter 'mine': choose one of __base__, default"):
        run(model, make_prompts(), adapter_names=["mine"] * 9)
    with pytest.raises(RequestError, match="unknown adapter 'default'"):
        run(tiny_model("llama"), make_prompts(), adapter_names=["default"] * 9)
