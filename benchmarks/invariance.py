"""Are a model's answers the same whatever the batch size, the order and the neighbours? Prints one JSON document.

    python benchmarks/invariance.py RUN [RUN ...] --task svamp --limit 200

Each run is loaded in float32 and answers the questions at batch 1, 7 and 64 and in shuffled order; the tokens of every
answer are compared with those at batch 1.
"""

import argparse
import json
import platform
import random
import sys
import time
from importlib.metadata import version

from llm_adapters.generation import generator as generation
from llm_adapters.models import loading as models
from llm_adapters.tasks.catalog import load_task
from llm_adapters.tasks.templates import encode_prompt, render_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--task", default="svamp")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    asked = parser.parse_args()
    questions = load_task(asked.task, limit=asked.limit)
    result = {
        "task": asked.task,
        "questions": len(questions),
        "precision": "float32",
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "runs": {run: measure(run, questions, asked.max_new_tokens) for run in asked.runs},
    }
    print(json.dumps(result, indent=2))


def measure(run: str, questions: list, max_new_tokens: int) -> dict:
    loaded = models.load(run, dtype="float32")
    template = loaded.template or "alpaca"
    prompts = [
        encode_prompt(
            loaded.tokenizer,
            render_prompt(template, q.question, q.input, tokenizer=loaded.tokenizer),
            template=template,
        )
        for q in questions
    ]
    shuffled = list(range(len(prompts)))
    random.Random(0).shuffle(shuffled)
    orders = {"1": (1, None), "7": (7, None), "64": (64, None), "64 shuffled": (64, shuffled)}
    answers, seconds = {}, {}
    for name, (size, order) in orders.items():
        order = order or list(range(len(prompts)))
        started = time.monotonic()
        found = dict(
            generation.generate(
                loaded.model,
                loaded.tokenizer,
                [prompts[i] for i in order],
                max_new_tokens=max_new_tokens,
                batch_size=size,
                merge=False,
            )
        )
        answers[name] = {order[at]: answer.tokens for at, answer in found.items()}
        seconds[name] = round(time.monotonic() - started, 1)
        print(f"{run}: batch {name}: {seconds[name]} s", file=sys.stderr, flush=True)
    different = {
        name: sum(answers["1"][i] != found[i] for i in found) for name, found in answers.items() if name != "1"
    }
    print(f"{run}: different from batch 1: {different}", file=sys.stderr, flush=True)
    return {"different_from_batch_1": different, "seconds": seconds, "tokens": sum(map(len, answers["1"].values()))}


if __name__ == "__main__":
    main()
