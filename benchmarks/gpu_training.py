"""How fast are adapters trained on a GPU? Prints a table, or one JSON document with --json.

    python benchmarks/gpu_training.py --json --models 7b 1b --methods lora series parallel
    python benchmarks/gpu_training.py --json --jobs all --data IDS     # everything below, in one call
    python benchmarks/gpu_training.py --jobs all --tiny --steps 4      # tries the script, on any machine

The job: a model of the named shape (Llama's, BLOOM's or GPT-J's) with random bfloat16 weights (nothing is downloaded),
GSM8K's token ids or, without --data, random ids in GSM8K's lengths (at most 256 tokens, mean about 172, a shared prefix
of 24, labels on the second half), 16 examples an optimiser step, AdamW. LoRA r=32, alpha=64, dropout 0.05 on q, k, v,
up and down (on BLOOM and GPT-J, the linear layers of the paper's recipes); series and parallel adapters of size 256 on
the MLP. `JOBS` has, by name, what one call measures: further shapes, 64 examples, long rows, checkpointing, quantised
bases.

Measured: real tokens (no padding) a second between two synchronised clocks after some steps, the device's peak memory,
and the first and the last loss. Each contestant runs in a process of its own.

ours           `FastPaths`, `Collator` and the Trainer of `llm_adapters.train`, the step in one pack, and CUDA graphs of
               the passes over it. `graphs` in the result says how many, and how long capturing took (within the timed
               steps for sizes that first come there).
no_graphs      the same without CUDA graphs.
padded         transformers.Trainer and PEFT, adapters in bfloat16, rows grouped by length, fused AdamW (LoRA only).
padding_free   the same without padding: `DataCollatorWithFlattening`, torch's variable-length attention, Liger (LoRA
               only; null with the reason where Liger is not installed).
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

SHAPES: dict[str, tuple[int, ...]] = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "bloom-7b1": (4096, 16384, 30, 32, 32, 250880),
    "gptj-6b": (4096, 16384, 28, 16, 16, 50400),
    "tiny": (64, 128, 2, 4, 2, 512),
}
FAMILIES = {"bloom-7b1": "bloom", "gptj-6b": "gptj"}  # the others are Llamas
LORA_TARGETS = {  # as in the paper's recipes
    "llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "bloom": ["query_key_value", "dense_4h_to_h", "dense_h_to_4h"],
    "gptj": ["q_proj", "k_proj", "v_proj", "fc_in", "fc_out"],
}
JOBS: dict[str, dict[str, Any]] = {
    "7b-lora": {"model": "7b", "peers": ["no_graphs", "padded", "padding_free"]},
    "7b-series": {"model": "7b", "method": "series"},
    "7b-parallel": {"model": "7b", "method": "parallel"},
    "7b-lora-64": {"model": "7b", "batch": 64, "steps": 12, "peers": ["padding_free"]},
    "7b-nf4": {"model": "7b", "quantization": "nf4"},
    "7b-int8": {"model": "7b", "quantization": "int8"},
    "7b-nf4-parallel": {"model": "7b", "method": "parallel", "quantization": "nf4"},
    "7b-2048": {"model": "7b", "length": 2048, "batch": 2, "peers": ["padding_free"]},
    "7b-2048-checkpointing": {
        "model": "7b", "length": 2048, "batch": 8, "steps": 12, "checkpointing": True, "peers": ["padding_free"]
    },
    "7b-lora-checkpointing": {"model": "7b", "checkpointing": True},
    "bloom-7b1": {"model": "bloom-7b1", "peers": ["padded"]},
    "gptj-6b": {"model": "gptj-6b", "peers": ["padded"]},
    "1b": {"model": "1b", "peers": ["no_graphs", "padding_free"]},
    "135m-64": {"model": "135m", "batch": 64, "peers": ["no_graphs", "padding_free"]},
}  # fmt: skip
PEERS = ("no_graphs", "padded", "padding_free")
IGNORED = -100


def shape(spec: dict[str, Any]) -> tuple[int, ...]:
    """Sizes of the model; with --tiny those of a tiny one, of the same family."""
    return SHAPES["tiny" if spec["tiny"] else spec["model"]]


def family(spec: dict[str, Any]) -> str:
    """The model's family, by transformers' name."""
    return FAMILIES.get(spec["model"], "llama")


def config_of(spec: dict[str, Any]) -> Any:
    """The model's config."""
    from transformers import AutoConfig

    hidden, intermediate, layers, heads, kv_heads, vocab = shape(spec)
    sizes: dict[str, Any] = {"hidden_size": hidden, "n_layer": layers, "n_head": heads}
    if family(spec) == "gptj":
        sizes = {"n_embd": hidden, "n_inner": intermediate, "n_layer": layers, "n_head": heads, "n_positions": 4096}
        sizes["rotary_dim"] = min(64, hidden // heads)
    elif family(spec) == "llama":
        sizes = {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": spec["model"] in ("1b", "135m"),
        }
    return AutoConfig.for_model(family(spec), vocab_size=vocab, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)


def base_model(spec: dict[str, Any], folder: str) -> Any:
    """A random model of the shape, in bfloat16, on the GPU if there is one; `folder` keeps it to be quantised."""
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = AutoModelForCausalLM.from_config(config_of(spec), dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    if not spec["quantization"]:
        return model
    from llm_adapters.models import Quantization

    model.save_pretrained(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    quantization = Quantization(spec["quantization"])
    options = {"quantization_config": quantization.config(torch.bfloat16), "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    quantization.finish(model)
    return model


def examples(path: str | None, vocab: int, count: int, length: int) -> list[dict[str, list[int]]]:
    """Rows of ids and labels, folded into the vocabulary; `length` above 256: random rows of that length."""
    draw = random.Random(0)
    if path and length <= 256:
        rows = json.loads(Path(path).read_text())
    else:
        prefix, rows = [draw.randrange(4, vocab) for _ in range(24)], []
        for _ in range(count):
            size = length if length > 256 else min(256, max(48, int(draw.gauss(172, 45))))
            ids = prefix + [draw.randrange(4, vocab) for _ in range(size - len(prefix))]
            rows.append({"input_ids": ids, "labels": [IGNORED] * (size // 2) + ids[size // 2 :]})

    def folded(ids: list[int]) -> list[int]:
        return [4 + (i - 4) % (vocab - 4) if i >= vocab else i for i in ids[:length]]

    rows = [{key: folded(row[key]) for key in ("input_ids", "labels")} for row in rows]
    return (rows * -(-count // len(rows)))[:count]


class Meter:
    """Tells, as a callback of Trainer, when the timed steps begin and end."""

    def __init__(self, warm_up: int) -> None:
        from transformers import TrainerCallback

        meter = self

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == warm_up:
                    meter.begin()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                meter.losses += [logs["loss"]] if logs and "loss" in logs else []

        self.callback, self.losses, self.started = Callback(), [], 0.0

    def begin(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def seconds(self) -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - self.started


def trainer_arguments(spec: dict[str, Any], folder: str, batch: int, accumulate: int, **more: Any) -> Any:
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        max_steps=spec["steps"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=3e-4,
        warmup_steps=1,
        optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        save_strategy="no",
        report_to="none",
        logging_steps=spec["steps"] - spec["warm_up"],
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=0,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=spec["checkpointing"],
        **more,
    )


def ours(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    from peft import get_peft_model

    from llm_adapters import methods
    from llm_adapters.fast_paths import FastPaths
    from llm_adapters.tasks.templates import Encoded
    from llm_adapters.training.collator import Collator
    from llm_adapters.training.graphs import MicroBatchGraphs
    from llm_adapters.training.trainer import AdapterTrainer

    model = base_model(spec, folder)
    options: dict[str, Any] = {"placement": ["mlp"], "bottleneck_size": 256, "bottleneck_dropout": spec["dropout"]}
    if spec["method"] == "lora":
        options = {"r": 32, "lora_alpha": 64, "lora_dropout": spec["dropout"]}
        options["target_modules"] = LORA_TARGETS[family(spec)]
    model = get_peft_model(model, methods.adapter_config(spec["method"], model, **options))
    if spec["checkpointing"]:
        model.enable_input_require_grads()
    rows = examples(spec["data"], shape(spec)[5], spec["steps"] * spec["batch"], spec["length"])
    data = [Encoded(row["input_ids"], row["labels"], 0) for row in rows]
    meter = Meter(spec["warm_up"])
    began = time.perf_counter()
    with FastPaths(model) as fast:
        tried = time.perf_counter() - began
        trainer = AdapterTrainer(
            model=model,
            args=trainer_arguments(
                spec,
                folder,
                spec["batch"],
                1,
                activation_checkpointing_kwargs={"use_reentrant": False},
                dataloader_pin_memory=False,
            ),
            data_collator=Collator(0, fast.packs, spec["pack"], None, model.device),
            train_dataset=data,
            callbacks=[meter.callback],
        )
        trainer.graphs = MicroBatchGraphs(model, fast, on=spec["contestant"] != "no_graphs")
        trainer.get_train_dataloader = lambda: trainer.get_eval_dataloader(data)  # in their order
        if spec["profile"]:
            return profiled(trainer, spec)
        trainer.train()
        seconds = meter.seconds()
    graphs = {"report": trainer.graphs.report, "seconds": round(trainer.graphs.seconds, 2)}
    told = {"fast_paths": fast.report, "trial_seconds": round(tried, 2), "graphs": graphs}
    return result(spec, rows, seconds, meter.losses, **told)


def profiled(trainer: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Which functions of the device take the time of the steps after the first ones."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        trainer.train()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:40]
    total = sum(e.self_device_time_total for e in profile.key_averages())
    rows = [[e.key[:90], e.count, round(e.self_device_time_total / 1000, 2)] for e in events]
    return {"device_ms": round(total / 1000, 1), "steps": spec["steps"], "kernels": rows}


def peer(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening, Trainer

    flat = spec["contestant"] == "padding_free"

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, dropout: float = 0.0, **kw: Any):
        group = q.shape[1] // k.shape[1]
        q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))
        k, v = (part.repeat_interleave(group, 1) for part in (k, v))
        ends, longest = kw["cu_seq_lens_q"], kw["max_length_q"]
        return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))[None], None

    model = base_model(spec, folder)
    if flat:
        AttentionInterface.register("varlen", attention)
        AttentionMaskInterface.register("varlen", lambda *_, **__: None)
        model.set_attn_implementation("varlen")
    options = {"r": 32, "lora_alpha": 64, "lora_dropout": spec["dropout"], "target_modules": LORA_TARGETS[family(spec)]}
    lora = LoraConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if spec["checkpointing"]:
        model.enable_input_require_grads()
    rows = examples(spec["data"], shape(spec)[5], spec["steps"] * spec["batch"], spec["length"])

    def padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = -(-max(len(row["input_ids"]) for row in batch) // 8) * 8
        filler = {"input_ids": 0, "labels": IGNORED}
        found = {
            key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in batch])
            for key, value in filler.items()
        }
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
        return found | {"attention_mask": torch.tensor(mask)}

    meter = Meter(spec["warm_up"])
    arguments = trainer_arguments(
        spec,
        folder,
        spec["batch"],
        1,
        use_liger_kernel=flat,
        train_sampling_strategy="random" if flat else "group_by_length",
        dataloader_num_workers=2 if torch.cuda.is_available() else 0,
    )
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True) if flat else padded
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[meter.callback]).train()
    return result(spec, rows, meter.seconds(), meter.losses)


def result(spec: dict[str, Any], rows: list[Any], seconds: float, losses: list[float], **more: Any) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    timed = rows[spec["warm_up"] * spec["batch"] :]
    tokens = sum(len(row["input_ids"]) for row in timed)
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "step_ms": round(1000 * seconds / (spec["steps"] - spec["warm_up"]), 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "needed_tflops": round(flops(spec, timed) / seconds / 1e12, 1),
        "losses": [round(loss, 4) for loss in losses],
        **more,
    }


def flops(spec: dict[str, Any], rows: list[Any]) -> float:
    """Operations that the timed steps need, with nothing shared and nothing computed twice (design: 4 P_body + ...)."""
    hidden, intermediate, layers, heads, kv_heads, vocab = shape(spec)
    kv, gated = hidden // heads * kv_heads, family(spec) == "llama"
    body = layers * (2 * hidden * hidden + 2 * hidden * kv + (3 if gated else 2) * hidden * intermediate)
    adapter = layers * 2 * 256 * hidden
    if spec["method"] == "lora":
        fused = family(spec) == "bloom"
        sizes = [(hidden, hidden + 2 * kv)] if fused else [(hidden, hidden), (hidden, kv), (hidden, kv)]
        sizes += [(hidden, intermediate), (intermediate, hidden)]
        adapter = layers * sum(32 * (a + b) for a, b in sizes)
    lengths = [len(row["input_ids"]) for row in rows]
    labels = sum(label != IGNORED for row in rows for label in row["labels"])
    attention = 6 * layers * hidden * sum(n * n for n in lengths)
    return (4 * body + 6 * adapter) * sum(lengths) + 4 * hidden * vocab * labels + attention


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """One contestant in a process of its own; what it printed last, or why there is nothing."""
    command = [sys.executable, __file__, "--contestant", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"tokens_per_second": None, "reason": done.stderr.strip().splitlines()[-1][:300] if done.stderr else ""}
    return json.loads(done.stdout.strip().splitlines()[-1])


def contest(spec: dict[str, Any]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps((ours if spec["contestant"] in ("ours", "no_graphs") else peer)(spec, folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--models", nargs="+", default=["7b"], choices=SHAPES)
    parser.add_argument("--methods", nargs="+", default=["lora"], choices=["lora", "series", "parallel"])
    parser.add_argument("--peers", nargs="*", default=[], choices=PEERS)
    parser.add_argument("--batch", type=int, default=16, help="examples an optimiser step")
    parser.add_argument("--length", type=int, default=256, help="above 256: rows of that length")
    parser.add_argument("--pack", type=int, default=16384, help="tokens of a pack")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm-up", type=int, default=4, help="steps that are not timed")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--data", help="JSON rows of input_ids and labels")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--quantization", choices=["nf4", "int8"], help="of the base (needs bitsandbytes)")
    parser.add_argument("--jobs", nargs="+", choices=["all", *JOBS], help="these, each with its own settings, instead")
    parser.add_argument("--tiny", action="store_true", help="every shape and job made tiny, to try the script")
    parser.add_argument("--profile", action="store_true", help="where the device's time goes, instead")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.contestant:
        contest(json.loads(asked.contestant))
        return
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    document: dict[str, Any] = {"device": device, "versions": common.versions("liger-kernel", "triton")}
    document["job"] = {key: value for key, value in vars(asked).items() if key not in ("json", "contestant", "data")}
    keys = ("batch", "length", "pack", "steps", "warm_up", "dropout", "data", "checkpointing", "quantization", "tiny")
    shared = {key: getattr(asked, key) for key in (*keys, "profile")}
    if asked.jobs:
        chosen = JOBS if "all" in asked.jobs else {name: JOBS[name] for name in asked.jobs}
        work = [(("jobs", name), {"method": "lora", "peers": asked.peers} | job) for name, job in chosen.items()]
        document["jobs"] = {}
    else:
        work = [
            ((model, method), {"model": model, "method": method, "peers": asked.peers})
            for model in asked.models
            for method in asked.methods
        ]
    for (group, name), job in work:
        spec = shared | job
        spec["steps"] = min(spec["steps"], shared["steps"])
        if asked.tiny:
            spec |= {"batch": min(spec["batch"], 4), "length": min(spec["length"], 300)}
        peers = [peer for peer in spec.pop("peers") if spec["method"] == "lora" or peer == "no_graphs"]
        row = document.setdefault(group, {})[name] = contestants(spec, peers, asked.repeats)
        print(json.dumps({group: {name: row}}), file=sys.stderr, flush=True)
    print(json.dumps(document, indent=2 if not asked.json else None))


def contestants(spec: dict[str, Any], peers: list[str], repeats: int) -> dict[str, Any]:
    """Run ours and the peers in turn."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *peers)}
    for _ in range(repeats):
        for name, found in runs.items():
            found.append(run(spec | {"contestant": name}))
    return summary(runs)


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The median run of ours, and its rate in those of the peers."""

    def median(found: list[dict[str, Any]]) -> dict[str, Any]:
        ordered = sorted(found, key=lambda one: one.get("tokens_per_second") or 0)
        return ordered[len(ordered) // 2]

    best = {name: median(found) for name, found in runs.items()}
    own = best["ours"]
    ratios = {
        f"ratio_{name}": round(own["tokens_per_second"] / one["tokens_per_second"], 3)
        if own.get("tokens_per_second") and one.get("tokens_per_second")
        else None
        for name, one in best.items()
        if name != "ours"
    }
    return own | ratios | {"contestants": best} if ratios else own


if __name__ == "__main__":
    main()
