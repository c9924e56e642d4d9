"""How fast are adapters trained, and in how much memory? Prints a table, or one JSON document with --json.

    python benchmarks/training.py --json
    python benchmarks/training.py --methods lora --peers p1 --repeats 1 --examples 96    # a quick look
    python benchmarks/training.py --sweep --repeats 1 --examples 64                      # how P2's settings were chosen

The job: SmolLM2-135M, bfloat16 base, 256 examples of GSM8K train that fit 256 tokens, `alpaca` prompt, labels on the
answer only, 16 examples per step, one epoch, AdamW at 3e-4 falling linearly to 0, 2 threads. LoRA r=32, alpha=64 on q,
k, v, up and down; series and parallel adapters of size 256 on the MLP.

Measured: real tokens (prompt and answer; no padding) per second, from the end of the second step to the end of the
last, and the peak resident memory of the process. Each contestant runs in a process of its own, on the same token ids,
all in turn, and the median of the repeats counts. The mean loss per label on held-out examples afterwards shows that
all of them learnt the same.

P1   transformers.Trainer and PEFT as their documentation shows it. Dropout 0.05, for P1 and for ours.
P2   the best that users get from TRL, transformers and PEFT on this machine (see `P2`). Dropout 0, for P2 and for ours.
     It runs in the environment that --trl-python or LLM_ADAPTERS_TRL_PYTHON names, to be made with:
         python -m venv trl-venv && trl-venv/bin/pip install -c constraints.txt -e . trl
PEFT has no series and no parallel adapter: there P1 and P2 train ours, as a plain PEFT method, with their own loop.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
from training_peers import BATCH, LEARNING_RATE, P2, SEED, WARM_UP, finish, p1, p2

METHODS = ("lora", "series", "parallel")
PEERS = ("p1", "p2")
MAX_LENGTH = 256
HELD_OUT = 32


# --- the data: rendered and encoded once, the same ids for all


def prepare(count: int, folder: Path) -> dict[str, Any]:
    """Write the job's examples to `folder`: as token ids for the peers, as texts for ours."""
    from llm_adapters.models import loading as models
    from llm_adapters.tasks.catalog import load_training_data
    from llm_adapters.tasks.templates import encode_example

    base = models.load_base("smollm2-135m", dtype="bfloat16", device="cpu")
    chosen = []
    for example in common.shuffled(load_training_data("gsm8k-train"), SEED):
        encoded = encode_example(base.tokenizer, example, template="alpaca")
        if len(encoded.input_ids) <= MAX_LENGTH:
            chosen.append((example, encoded))
        if len(chosen) == count + HELD_OUT:
            break
    train, held_out = chosen[:count], chosen[count:]

    def ids(rows: list) -> list[dict]:
        return [{"input_ids": e.input_ids, "labels": e.labels} for _, e in rows]

    (folder / "encoded.json").write_text(json.dumps({"train": ids(train), "held_out": ids(held_out)}))
    texts = [{"question": e.question, "response": e.response} for e, _ in train]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    sequences = [e.input_ids for _, e in train]
    prefix = next(at for at, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1)
    embedding = base.model.get_input_embeddings().weight.numel()
    return {
        "model": str(base.path),
        "examples": count,
        "tokens": sum(map(len, sequences)),
        "labels": sum(label != -100 for _, e in train for label in e.labels),
        "shared_prefix": prefix,
        # what has to be computed: everything once, and the shared prefix once per optimiser step
        "computed_tokens": sum(len(s) - prefix for s in sequences) + prefix * -(-count // BATCH),
        "block_parameters": sum(p.numel() for p in base.model.parameters()) - embedding,  # input and output are tied
        "head_parameters": embedding,
    }


def flops(job: dict, adapter_parameters: int) -> float:
    """The FLOPs that the job cannot do without.

    Frozen blocks: forward, and backward to the activations. Adapters: that, and the gradient of their weights. Output
    head: as the blocks, at labels only. Attention scores, norms and the optimiser are left out.
    """
    per_computed = 4 * job["block_parameters"] + 6 * adapter_parameters
    return per_computed * job["computed_tokens"] + 4 * job["head_parameters"] * job["labels"]


# --- the contestants, each in a process of its own


def ours(spec: dict) -> dict:
    """`llm_adapters.train`, as anyone calls it."""
    import llm_adapters

    data = json.loads(Path(spec["folder"], "encoded.json").read_text())
    dropout = spec["dropout"]
    lora = {"r": 32, "lora_alpha": 64, "lora_dropout": dropout}
    lora["target_modules"] = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    bottleneck = {"placement": ["mlp"], "bottleneck_size": 256, "bottleneck_dropout": dropout}
    recipe = {
        "model": {"name": spec["model"], "dtype": "bfloat16", "device": "cpu"},
        "adapter": {"method": spec["method"], "options": lora if spec["method"] == "lora" else bottleneck},
        "data": {
            "train": str(Path(spec["folder"], "train.jsonl")),
            "columns": {"question": "question", "response": "response"},
            "template": "alpaca",
            "max_length": MAX_LENGTH,
        },
        "training": {
            "epochs": 1,
            "batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "warmup": 0,
            "schedule": "linear",
            "seed": SEED,
            "log_every": 1,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        run = llm_adapters.train(recipe, output=Path(folder, "run"), progress=False)
    total = sum(len(row["input_ids"]) for row in data["train"])
    if run.manifest["data"]["train_tokens"] != total:
        raise RuntimeError(f"not the same tokens: {run.manifest['data']['train_tokens']}, and the peers' {total}")
    steps = [line for line in run.log if "loss" in line]
    first, last = steps[WARM_UP - 1], steps[-1]
    tokens = [line.get("tokens", line["epoch"] * total) for line in (first, last)]
    result = {
        "tokens_per_second": (tokens[1] - tokens[0]) / (last["seconds"] - first["seconds"]),
        "tokens": total,
        "steps": last["step"],
        "seconds": last["seconds"],
    }
    return finish(run.model, data, [line["loss"] for line in steps], result)


CONTESTANTS = {"p1": p1, "p2": p2, "ours": ours, "rate": common.matmul_rate}


# --- the comparison


def compare(method: str, asked: argparse.Namespace, job: dict, folder: Path, rates: list[float]) -> dict[str, Any]:
    """All contestants on one method, in turn."""
    names = ["rate", "ours"] + (["p1"] if "p1" in asked.peers else [])
    names += ["ours_no_dropout", "p2"] if "p2" in asked.peers else []

    def run(name: str) -> dict:
        spec = {"contestant": name, "method": method, "model": job["model"], "folder": str(folder), "dropout": 0.05}
        if name == "ours_no_dropout":
            spec |= {"contestant": "ours", "dropout": 0.0}
        python = p2_python(asked) if name == "p2" else None
        if name == "p2" and python is None:
            return {"reason": "TRL's environment is not named: --trl-python or LLM_ADAPTERS_TRL_PYTHON"}
        return common.run_worker(__file__, spec, python=python)

    common.say(f"--- {method}")
    results = common.alternate(names, asked.repeats, run)
    rates += [r["flops_per_second"] for r in results.pop("rate") if "reason" not in r]
    speed = {name: common.median(done, "tokens_per_second") for name, done in results.items()}
    memory = {name: common.median(done, "peak_memory") for name, done in results.items()}
    found: dict[str, Any] = {
        "ratio_p1": common.ratio(speed["ours"], speed.get("p1")),
        "ratio_p2": common.ratio(speed.get("ours_no_dropout"), speed.get("p2")),
        "ceiling_share": None,
        "memory_ratio": common.ratio(memory["ours"], memory.get("p1")),
        "memory_ratio_p2": common.ratio(memory.get("ours_no_dropout"), memory.get("p2")),
    }
    parameters = common.median(results["ours"], "trainable_parameters")
    if parameters is not None and rates:
        ceiling = max(rates) * job["tokens"] / flops(job, int(parameters))
        found["ceiling_share"] = common.ratio(speed["ours"], ceiling)
        found["ceiling_share_no_dropout"] = common.ratio(speed.get("ours_no_dropout"), ceiling)
        found["ceiling_tokens_per_second"] = common.rounded(ceiling)
        found["trainable_parameters"] = int(parameters)
    found["contestants"] = {
        name: {
            "tokens_per_second": common.rounded(speed[name]),
            "tokens_per_second_each": common.each(done, "tokens_per_second"),
            "disturbance_each": common.each(done, "disturbance", 2),
            "peak_memory": memory[name],
            "final_loss_each": common.each(done, "final_loss"),
            "held_out_loss_each": common.each(done, "held_out_loss"),
            **({"reason": why} if (why := common.reason(done)) else {}),
        }
        for name, done in results.items()
    }
    for peer in PEERS:
        if peer not in results:
            found[f"reason_{peer}"] = "not asked for"
        elif why := common.reason(results[peer]):
            found[f"reason_{peer}"] = why
    return found


def p2_python(asked: argparse.Namespace) -> str | None:
    """The interpreter for P2; this one will do if TRL is installed beside the project, or not needed."""
    import importlib.util

    here = P2["trainer"] != "sft" or importlib.util.find_spec("trl") is not None
    return asked.trl_python or (sys.executable if here else None)


def _setting(trainer: str, layout: str, sampling: str, micro_batch: int, pack: int = 0) -> dict[str, Any]:
    return {"trainer": trainer, "layout": layout, "sampling": sampling, "micro_batch": micro_batch, "pack": pack}


# Trainer, layout, order of the examples, examples at once; packing: packs at once, tokens in a pack.
SWEEP: dict[str, dict[str, Any]] = {
    " ".join(map(str, setting)): _setting(*setting)
    for setting in (
        ("trainer", "padded", "random", 4),
        ("trainer", "padded", "group_by_length", 4),
        ("trainer", "padded", "group_by_length", 8),
        ("trainer", "padded", "group_by_length", 16),
        ("trainer", "padding_free", "random", 4),
        ("trainer", "padding_free", "random", 8),
        ("sft", "padded", "group_by_length", 4),
        ("sft", "padded", "group_by_length", 8),
        ("sft", "padded", "group_by_length", 16),
        ("sft", "padding_free", "random", 4),
        ("sft", "padding_free", "random", 8),
        ("sft", "packing", "random", 1, 512),
        ("sft", "packing", "random", 1, 1024),
    )
}


def sweep(asked: argparse.Namespace, job: dict, folder: Path) -> dict[str, Any]:
    """Every setting of P2, in turn: the fastest is what `P2` should say.

    Tokens per second of CPU time are told as well: on a machine that does other work meanwhile they say more.
    """
    method = asked.methods[0]

    def run(name: str) -> dict:
        spec = {"contestant": "p2", "method": method, "model": job["model"], "folder": str(folder)}
        return common.run_worker(__file__, spec | {"use": SWEEP[name]}, python=asked.trl_python)

    names = [name for name in SWEEP if not asked.sweep or any(part in name for part in asked.sweep)]
    results = common.alternate(names, asked.repeats, run)
    return {
        name: {
            "tokens_per_second": common.rounded(common.median(done, "tokens_per_second")),
            "tokens_per_cpu_second": common.rounded(common.median(done, "tokens_per_cpu_second")),
            "peak_memory": common.median(done, "peak_memory"),
            "held_out_loss": common.rounded(common.median(done, "held_out_loss")),
            **({"reason": why} if (why := common.reason(done)) else {}),
        }
        for name, done in results.items()
    }


def main() -> None:
    if common.worker_main(CONTESTANTS, sys.argv[1:]):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--examples", type=int, default=256, help="a multiple of 16; 48 or more")
    parser.add_argument("--trl-python", default=os.environ.get("LLM_ADAPTERS_TRL_PYTHON"), help="TRL's interpreter")
    parser.add_argument(
        "--sweep",
        nargs="*",
        metavar="PART",
        help="measure P2's settings instead: all, or those with PART in their name",
    )
    asked = parser.parse_args()
    if asked.examples % BATCH or asked.examples <= WARM_UP * BATCH:
        parser.error(f"--examples {asked.examples}: a multiple of {BATCH}, and more than {WARM_UP * BATCH}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        document: dict[str, Any] = {"machine": common.machine()}
        job = prepare(asked.examples, folder)
        if asked.sweep is not None:
            document |= {"sweep": sweep(asked, job, folder), "method": asked.methods[0]}
        else:
            rates: list[float] = []
            document = {m: compare(m, asked, job, folder, rates) for m in asked.methods} | document
            document["machine"]["bfloat16_flops_per_second"] = common.rounded(max(rates, default=None))
    document["versions"] = common.versions() | common.versions_of(asked.trl_python, "trl")
    document["settings"] = {
        "job": {k: v for k, v in job.items() if k != "model"}
        | {"batch_size": BATCH, "max_length": MAX_LENGTH, "learning_rate": LEARNING_RATE, "seed": SEED}
        | {"warm_up_steps": WARM_UP, "held_out_examples": HELD_OUT, "repeats": asked.repeats},
        "p1": {"trainer": "transformers.Trainer", "micro_batch": 4, "accumulation": 4, "dropout": 0.05}
        | {"collator": "DataCollatorForSeq2Seq, pad_to_multiple_of 8", "sampling": "random", "adapters": "float32"},
        "p2": P2 | {"dropout": 0.0, "adapters": "bfloat16", "gradient_checkpointing": False, "autocast": False},
    }
    print(json.dumps(document, indent=2) if asked.json else text(document, asked))


def text(document: dict, asked: argparse.Namespace) -> str:
    """The document as a small table."""

    def shown(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    if asked.sweep is not None:
        found = sorted(document["sweep"].items(), key=lambda item: -(item[1]["tokens_per_second"] or 0))
        rows = [
            [n, *(shown(r[k]) for k in ("tokens_per_second", "held_out_loss")), r.get("reason", "")] for n, r in found
        ]
        return common.table([["setting", "tokens/s", "held-out loss", ""], *rows])
    keys = ("ratio_p1", "ratio_p2", "ceiling_share", "memory_ratio")
    rows = [["method", "contestant", "tokens/s", "peak MB", "held-out loss", *keys]]
    for method in asked.methods:
        for name, r in document[method]["contestants"].items():
            loss = r["held_out_loss_each"][0] if r["held_out_loss_each"] else None
            memory = r["peak_memory"] and round(r["peak_memory"] / 1e6)
            ratios = [shown(document[method][k]) if name == "ours" else "" for k in keys]
            rows.append([method, name, shown(r["tokens_per_second"]), shown(memory), shown(loss), *ratios])
    return common.table(rows)


if __name__ == "__main__":
    main()
