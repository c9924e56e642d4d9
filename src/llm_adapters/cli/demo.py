"""`llm-adapters demo`: a real model, a real adapter, unseen word problems; before and after."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_adapters.training import Recipe

TASK = "wordproblems"
EXAMPLES, HELD_OUT = 600, 40


def demo(*, output: Path | None = None, quick: bool = False, method: str = "lora", json: bool = False) -> None:
    """Train an adapter on arithmetic word problems and show what it bought, offline and in minutes.

    Args:
        output: the run folder; demo-run by default, or with a number behind it if that is taken.
        quick: a tiny random model and a few steps, in seconds, to try the machinery.
        method: the adapter: lora, series, parallel, ...
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters.cli import tables

    result = run(Path(output) if output else None, quick=quick, method=method)
    if json:
        tables.print_json(result)
    else:
        show(result, quick=quick)


def recipe(method: str) -> "Recipe":
    """Recipe that the demo trains; the same as recipes/smollm2-wordproblems.yaml but for the method.

    Args:
        method: the adapter's method.
    """
    from llm_adapters.training import Recipe

    chosen = Recipe()
    chosen.adapter.method = method
    if method == "lora":
        chosen.adapter.options = {"lora_dropout": 0.0}  # one pass over the data: there is nothing to overfit
    chosen.data.train, chosen.data.template = "wordproblems-train", "plain"
    chosen.data.limit, chosen.data.validation, chosen.data.max_length = EXAMPLES + HELD_OUT, HELD_OUT, 256
    chosen.training.epochs, chosen.training.learning_rate = 1, 1e-3
    chosen.training.batch_size = chosen.training.micro_batch_size = 8
    return chosen


def run(output: Path | None, *, quick: bool = False, method: str = "lora") -> dict[str, Any]:
    """Measure the base model, train an adapter, measure again, and tell the difference.

    Args:
        output: the folder for everything; None for demo-run, with a number behind it where that is taken.
        quick: a tiny random model and few steps, to try the machinery in seconds.
        method: the adapter's method.

    Returns:
        Accuracies before and after, the gain in points, and the paths of run folder and plot.

    Raises:
        RequestError: the method or the model is not available; the message says what to install.
    """
    from llm_adapters import evaluation, methods, training
    from llm_adapters.cli import plots
    from llm_adapters.files import write_json

    methods.get(method)  # before the base model is measured for nothing
    chosen = recipe(method)
    examples, limit, new_tokens = EXAMPLES, 150, 64
    if quick:
        examples, limit, new_tokens = 32, 4, 8
        chosen.model.name = str(tiny_model())
        chosen.data.limit, chosen.data.validation, chosen.training.max_steps = examples + 8, 8, 4
    folder = output or _free(Path("demo-run"))
    _say(f"1/3  the base model {chosen.model.name} on {limit} word problems that no training template made")
    before = evaluation.evaluate(
        chosen.model.name,
        tasks=[TASK],
        limit=limit,
        template=chosen.data.template,
        max_new_tokens=new_tokens,
        output=folder / "base",
    )
    _say(f"2/3  training a {method} adapter on {examples} word problems")
    trained = training.train(chosen, folder / "run")
    _say("3/3  the same questions again, with the adapter")
    after = evaluation.evaluate(trained.folder, tasks=[TASK], limit=limit, max_new_tokens=new_tokens)
    plot = plots.loss_plot(trained.log, folder / "loss.png", f"{method} on {chosen.model.name}")
    result = {
        "model": chosen.model.name,
        "method": method,
        "before": before.tasks[TASK].to_dict(),
        "after": after.tasks[TASK].to_dict(),
        "gain_points": 100 * (after.tasks[TASK].accuracy - before.tasks[TASK].accuracy),
        "run": str(trained.folder),
        "plot": str(plot),
    }
    write_json(folder / "result.json", result)
    return result


def show(result: dict[str, Any], *, quick: bool = False) -> None:
    """Print the table before and after, and an honest word about what was trained on what.

    Args:
        result: what `run` returned.
        quick: the model was tiny and random.
    """
    from llm_adapters.cli import tables

    rows = []
    for name, key in (("base model", "before"), (f"with the {result['method']} adapter", "after")):
        r = result[key]
        low, high = r["interval"]
        interval = f"{100 * low:.0f} to {100 * high:.0f} %"
        rows.append((name, f"{100 * r['accuracy']:.1f} %", interval, f"{r['correct']}/{r['total']}"))
    tables.show(f"{TASK}: {result['model']}", ("", "accuracy", "95 % interval", "correct"), rows)
    if quick:
        print("The model was random and tiny: these numbers show that the machinery runs, and nothing else.")
    else:
        print(
            "Trained and tested on generated one- and two-step arithmetic problems. The test's sentence templates\n"
            "never occur in training, but the kinds of problem do: this shows that the adapter learnt to solve and\n"
            "answer such problems, not mathematics at large. For that, train on GSM8K (recipes/)."
        )
    print(f"loss plot: {result['plot']}\nrun folder: {result['run']}")


def tiny_model() -> Path:
    """Folder with a tiny random llama and a tokenizer made from the demo's own text; made once, in the cache."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    from llm_adapters.files import cache_folder
    from llm_adapters.models.sources import quiet
    from llm_adapters.tasks import wordproblems

    folder = cache_folder("models") / "tiny-random-llama"
    if (folder / "done").exists():
        return folder

    def texts() -> Iterator[str]:
        for example in wordproblems.generate("train")[:200]:
            yield example.question
            yield example.response

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "done").touch()
    return folder


def _free(folder: Path) -> Path:
    """`folder`, or the first of its numbered siblings, that holds no finished demo."""
    number = 1
    chosen = folder
    while (chosen / "result.json").exists():
        number += 1
        chosen = folder.with_name(f"{folder.name}-{number}")
    return chosen


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
