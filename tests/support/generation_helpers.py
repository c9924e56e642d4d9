"""What the tests of generation share: prompts, adapters that do something, and generation in its plainest form."""

import contextlib
import copy
import random

import peft
import torch
from tiny import tiny_model, tiny_tokenizer

from llm_adapters.fast_paths import FastPaths
from llm_adapters.generation.engine import Engine
from llm_adapters.generation.generator import generate

NEW = 8
LENGTHS = (5, 17, 33, 9, 1, 26, 26, 40, 2)


def untied(family):
    """A model whose head is not its embeddings: tied and random, those would say every token again."""
    return tiny_model(family, tie_word_embeddings=False)


def make_prompts():
    choose = random.Random(1)
    return [[choose.randrange(3, 300) for _ in range(length)] for length in LENGTHS]


def run(model, prompts, **options):
    return dict(generate(model, tiny_tokenizer(), prompts, **{"max_new_tokens": NEW} | options))


def reference(model, prompt, ends=(2,)):
    """Greedy decoding in its plainest form: one prompt, no padding, no cache, the whole text again for every token."""
    tokens = []
    with torch.no_grad():
        while len(tokens) < NEW:
            following = int(model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1].argmax())
            if following in ends:
                break
            tokens.append(following)
    return tuple(tokens)


def trained(model, config, seed=3):
    """A PEFT model whose adapter weights are not at their start, where most adapters do nothing."""
    adapted = peft.get_peft_model(model, copy.deepcopy(config))  # PEFT fills in the model's sizes
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


def small_blocks(monkeypatch):
    """Blocks of four tokens, and no rounding of their number: even short answers have many."""
    for module in ("kv_cache", "paged_attention"):
        monkeypatch.setattr(f"llm_adapters.ops.{module}.BLOCK_SIZE", 4)
        monkeypatch.setattr(f"llm_adapters.ops.{module}.BLOCK_STEP", 1)


@contextlib.contextmanager
def opened(model, stop_token_ids=(2,), adapters=None, **options):
    with FastPaths(model, inference=True, adapters=adapters) as fast:
        yield Engine(fast, list(stop_token_ids), **options)


def finish(engine, found=None):
    """Step until nothing is left; the tokens of each request, and the reason why it ended."""
    found, reasons = found if found is not None else {}, {}
    while engine.has_unfinished:
        for output in engine.step():
            assert output.request_id not in reasons
            found.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
    return found, reasons


def without_stop(tokens):
    return tuple(tokens[:-1] if tokens[-1] == 2 else tokens)
