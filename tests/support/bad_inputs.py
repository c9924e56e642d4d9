"""Thousands of wrong inputs from a seed, each given to the command line in a forked process, and what became of them.

    python tests/support/bad_inputs.py --cases 2000 --seed 0 > result.json

A case says whether it must be refused (True: exit code 2) or may be (None: any of 0, 1, 2). Besides: no traceback,
no more than 30 seconds, nothing half-written left behind, no code of a stranger run. `faults` of the result are those
that were not so; the exit code is 1 where there are any.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SECONDS, MEMORY = 30.0, 16 * 10**9
LEGACY = Path(__file__).parents[1] / "data" / "golden" / "llama"
OUT = "out"  # where a case's output goes, in its own folder

Change = Callable[[Path], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One wrong input: `words` are given to the command line in a copy of the material that `change` has spoilt."""

    kind: str
    name: str
    words: tuple[str, ...]
    refused: bool | None
    change: Change = lambda folder: None


# --- what is spoilt


def make_material(folder: Path) -> None:
    """A tiny model, data, a task, a recipe, a finished run and its evaluation, and checkpoints of the paper's code."""
    from tiny import save_tiny

    from llm_adapters.cli import main

    save_tiny(folder / "base")
    rows = [
        {"question": f"Tom has {a} apples and buys {a + 3}. How many?", "answer": f"{2 * a + 3}"} for a in range(12)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines)
    (folder / "test.jsonl").write_text("".join(lines.splitlines(keepends=True)[:2]))
    (folder / "task.yaml").write_text("title: apples\nkind: number\nfile: test.jsonl\n")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "recipe.yaml", "--output", "run"]) == 0
        assert main(["evaluate", *EVALUATE]) == 0
        assert main(list(MODEL)) == 0  # in the other precision, whose kernels are then compiled too
        shutil.rmtree(OUT)
    finally:
        os.chdir(before)
    shutil.copytree(LEGACY, folder / "legacy")


RECIPE: dict[str, Any] = {
    "model": {"name": "base", "dtype": "float32", "device": "cpu"},
    "adapter": {"method": "lora", "options": {"r": 2}},
    "data": {"train": "train.jsonl", "template": "plain", "max_length": 200},
    "training": {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01, "fast_paths": False, "warmup": 0},
}
TRAIN = ("train", "recipe.yaml", "--output", OUT)
EVALUATE = ("run", "--tasks", "task.yaml", "--max-new-tokens", "2")
MODEL = ("evaluate", "--model", "base", "--tasks", "task.yaml", "--max-new-tokens", "2", "--output", OUT)


# --- ways to spoil


def edit(file: str, *path: Any, value: Any = None, drop: bool = False) -> Change:
    """Put `value` at `path` of a JSON document (of its first line, for a .jsonl), or take it away."""

    def change(folder: Path) -> None:
        target = folder / file
        first, *rest = target.read_text().split("\n") if file.endswith("l") else [target.read_text()]
        document = inner = json.loads(first)
        for key in path[:-1]:
            inner = inner[key]
        if drop:
            inner.pop(path[-1], None)
        else:
            inner[path[-1]] = value
        target.write_text("\n".join([json.dumps(document), *rest]), errors="surrogatepass")

    return change


def write(file: str, content: str | bytes) -> Change:
    """Write `content` to `file`."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(data)  # type: ignore[func-returns-value,return-value]


def damage(file: str, seed: int) -> Change:
    """Flip, cut, repeat or insert bytes."""

    def change(folder: Path) -> None:
        rng = random.Random(seed)
        data = bytearray((folder / file).read_bytes())
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        how = rng.randrange(5)
        if how == 0:
            del data[at:]
        elif how == 1:
            del data[at:end]
        elif how == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif how == 3:
            data[at:at] = data[at : min(end, at + 5000)]
        else:
            for _ in range(rng.randrange(1, 20)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / file).write_bytes(data)

    return change


def tensors(file: str, change: Callable[[dict[str, Any], random.Random], Any], seed: int = 0) -> Change:
    """Change the tensors in a .safetensors or .bin file."""

    def changed(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        path = folder / file
        binary = path.suffix == ".bin"
        weights = torch.load(path, weights_only=True) if binary else load_file(path)
        if (found := change(weights, random.Random(seed))) is not None:
            weights = found
        if binary:
            torch.save(weights, path)
        else:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})

    return changed


def _some(change: Callable[[Any], Any]) -> Callable[[dict[str, Any], random.Random], None]:
    def all_of_one(weights: dict[str, Any], rng: random.Random) -> None:
        name = rng.choice(sorted(name for name, tensor in weights.items() if tensor.dim() > 1))
        weights[name] = change(weights[name])

    return all_of_one


def _wrong_tensors() -> dict[str, Callable[[dict[str, Any], random.Random], Any]]:
    import torch

    return {
        "NaN": _some(lambda t: t * float("nan")),
        "infinite": _some(lambda t: t + float("inf")),
        "integers": _some(lambda t: t.to(torch.int32)),
        "truth values": _some(lambda t: t > 0),
        "complex": _some(lambda t: t.to(torch.complex64)),
        "another shape": _some(lambda t: torch.cat([t, t])),
        "flat": _some(lambda t: t.reshape(-1)),
        "nothing": _some(lambda t: t[:0]),
        "one missing": lambda w, rng: dict(rng.sample(sorted(w.items()), len(w) - 1)),
        "one more": lambda w, rng: w.update(more=torch.zeros(3)),
        "other names": lambda w, rng: {f"x.{name}": tensor for name, tensor in w.items()},
        "none at all": lambda w, rng: w.clear(),
    }


class _Stranger:
    """Code that a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch OWNED",)


def _pickle(file: str) -> Change:
    import pickle

    return write(file, pickle.dumps({"weight": _Stranger()}))


NOT_JSON = {
    "empty": "",
    "cut": '{"a": [1, 2',
    "no object": "[1, 2]",
    "a number": "3",
    "null": "null",
    "binary": b"\x00\xff\xfe\x80",
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 50_000,
    "long number": '{"a": ' + "9" * 5000 + "}",
    "half a character": '{"a": "\\ud800"}',
    "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 123\n",
    "not UTF-8": b'{"a": "\xe9"}',
}
NOT_YAML = {
    "cut": "model: {name: [",
    "tab": "model:\n\tname: x",
    "tag": "model: !!python/object:os.system x",
    "no bool": "model: !!bool x",
    "no int": "data: {limit: !!int x}",
    "no date": "model: !!timestamp x",
    "long number": f"data: {{limit: {'9' * 5000}}}",
    "itself": "model: &x {name: *x}",
    "deep": "[" * 5000,
    "binary": b"\x00\x01\xff",
    "not UTF-8": b"title: \xe9",
    "a text": "text",
    "a list": "- 1",
    "empty key": "? \n: 1",
    "no scalar key": "{[1]: 2}",
    "null byte": 'title: "\\0"\nmore: 1',
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
}
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "minus": -1,
    "zero": 0,
    "half": 1.5,
    "huge": 10**30,
    "infinite": float("inf"),
    "NaN": float("nan"),
    "empty text": "",
    "text": "x",
    "half a character": "\ud800",
    "null byte": "a\0b",
    "long text": "y" * 5000,
    "empty list": [],
    "list": [1],
    "empty mapping": {},
    "mapping": {"a": 1},
}
PATHS = {
    "long": "y" * 300,
    "below a file": "train.jsonl/x",
    "no home": "~nobody-here/x",
    "empty": "",
    "a file": "train.jsonl",
    "a device": "/dev/null",
    "loop": "loop",
    "not there": "no/such/place",
    "not text": "a\udcffb",
    "markup": "[red]x[/b]",
    "dots": "run/../" * 50 + "x",  # inside the case's own folder
}


def loop(folder: Path) -> None:
    """A link to itself."""
    (folder / "loop").symlink_to("loop")


# --- the kinds


# What each key of a recipe takes of VALUES; the rest must be refused. "?": either.
_KEYS: dict[str, tuple[str, ...]] = {
    "model.name": (),
    "model.dtype": (),
    "model.device": (),
    "adapter.method": (),
    "adapter.options": ("empty mapping",),
    "data.train": (),
    "data.columns": ("null", "empty mapping", "?mapping"),
    "data.limit": ("null",),
    "data.validation": ("zero",),
    "data.template": (),
    "data.max_length": (),
    "data.too_long": (),
    "data.train_on_prompt": ("true",),
    "training.epochs": ("half", "huge"),
    "training.max_steps": ("?null",),
    "training.batch_size": (),
    "training.micro_batch_tokens": (),
    "training.micro_batch_size": ("null",),
    "training.learning_rate": ("half", "?huge"),
    "training.warmup": ("zero", "?half", "?huge"),
    "training.schedule": (),
    "training.weight_decay": ("zero", "half", "?huge"),
    "training.max_grad_norm": ("half", "huge"),
    "training.seed": ("zero",),
    "training.gradient_checkpointing": ("true",),
    "training.fast_paths": ("true",),
    "training.log_every": (),
    "training.evaluate_every": ("null",),
    "training.save_every": ("null",),
    "training.keep_best": (),
    "training.early_stopping": ("null",),
    "training.trackers": ("empty list",),
    "evaluation.tasks": ("empty list",),
    "evaluation.limit": ("null",),
    "evaluation.protocol": (),
    "evaluation.max_new_tokens": (),
    "evaluation.batch_size": ("null",),
}
_OPTIONS: dict[str, list[Any]] = {
    "r": [0, -1, "x", [], {}, 10**10, 1.5],
    "target_modules": ["(", "nowhere", [], ["nowhere"], [1], 5, "(a*)*#"],
    "exclude_modules": ["(", 5],
    "rank_pattern": ["x", [1], {"(": 2}, {"q_proj": "x"}],
    "bias": ["x", 1],
    "lora_dropout": [-1, 2, "x"],
    "layers_to_transform": [[99], "x"],
    "layer_replication": [[[0, 99]], "x"],
    "modules_to_save": [["nowhere"], 5],
    "trainable_token_indices": [[10**9], "x"],
    "init_lora_weights": ["nothing"],
    "nothing": [1],
    "peft_type": ["LORA"],
}


def recipes(rng: random.Random) -> Iterator[Case]:
    """Recipes whose values are of other types, out of bounds, or that are no YAML."""
    for key, taken in _KEYS.items():
        section, name = key.split(".")
        for what, value in VALUES.items():
            refused = None if f"?{what}" in taken else what not in taken
            document = {**RECIPE, section: {**RECIPE.get(section, {}), name: value}}
            text = json.dumps(document).replace("Infinity", ".inf").replace("NaN", ".nan")
            if what in taken:
                refused = None
            yield Case("recipe", f"{key} is {what}", TRAIN, refused, write("recipe.yaml", text))
    for what, text in NOT_YAML.items():
        yield Case("recipe", what, TRAIN, True, write("recipe.yaml", text))
    for section in RECIPE:
        for what, value in VALUES.items():
            refused = what not in ("empty mapping",)
            text = json.dumps({**RECIPE, section: value}).replace("Infinity", ".inf").replace("NaN", ".nan")
            if section in ("model", "data", "training") and not refused:
                continue  # the default model and data are not these
            yield Case("recipe", f"{section} is {what}", TRAIN, refused or None, write("recipe.yaml", text))
    for option, values in _OPTIONS.items():
        for value in values:
            document = {**RECIPE, "adapter": {"method": "lora", "options": {"r": 2, option: value}}}
            yield Case("recipe", f"option {option} {value!r}", TRAIN, True, write("recipe.yaml", json.dumps(document)))
    for _ in range(80):
        yield Case("recipe", "damaged", TRAIN, None, damage("recipe.yaml", rng.getrandbits(32)))


def command_lines(rng: random.Random) -> Iterator[Case]:
    """Verbs, options and values that are none."""
    verbs: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        "train": (("train", "recipe.yaml"), {"--output": "path"}),
        "evaluate": (
            ("evaluate", "--model", "base"),
            {
                "--tasks": "name",
                "--adapter": "path",
                "--limit": "count",
                "--batch-size": "count",
                "--output": "made",
                "--protocol": "name",
                "--template": "name",
                "--max-new-tokens": "count",
                "--dtype": "name",
                "--device": "name",
                "--check-invariance": "count0",
            },
        ),
        "results rescore": (("results", "rescore", "run"), {"--protocol": "name"}),
        "results spread": (("results", "spread", "run", "run"), {"--protocol": "name"}),
        "inspect": (("inspect", "base"), {"--method": "name", "--options": "mapping"}),
        "data check": (("data", "check", "train.jsonl"), {"--against": "name", "--columns": "mapping"}),
        "convert": (("convert", "legacy/adapterh", OUT), {"--model": "name"}),
    }
    wrong = {
        "count": ["0", "-1", "x", "1.5", "inf", "nan", "", "[1]", "{a: 1}", "9" * 30, "null?"],
        "count0": ["-1", "x", "1.5", "inf", "nan", "", "[1]"],
        "name": ["nothing", "", "[1]", "\udcff", "y" * 5000, "../x"],
        "mapping": ["x", "[1]", "3", "{", "{a: &x [*x]}", "[" * 5000],
        "path": [*PATHS.values()],
        "made": [PATHS[name] for name in ("long", "below a file", "a file", "a device", "loop")],
    }
    for verb, (words, options) in verbs.items():
        given = ["--output", OUT] if verb == "train" else ["--tasks", "task.yaml"] if verb == "evaluate" else []
        given += ["--against", "wordproblems"] if verb == "data check" else []
        for option, kind in options.items():
            for value in wrong[kind]:
                refused = None if value.endswith("?") or value in PATHS.values() else True
                if value in (PATHS["long"], PATHS["below a file"], PATHS["a file"], PATHS["a device"], PATHS["loop"]):
                    refused = True
                yield Case(
                    "command line",
                    f"{verb} {option} {value[:30]!r}",
                    (*words, *given, option, value.rstrip("?")),
                    refused,
                    loop,
                )
            yield Case("command line", f"{verb} {option} without value", (*words, option), True)
        yield Case("command line", f"{verb} with more", (*words, *given, "--no-such-option", "1"), True)
        yield Case("command line", f"{verb} with a word more", (*words, *given, "--limit", "1", "x", "y"), True)
        for at in range(len(verb.split()), len(words)):
            for what, value in PATHS.items():
                name = f"{verb} word {at} {what}"
                if words[at].startswith("--"):
                    continue
                taken = ["dots", "not there", "markup"]  # of an output they are fine
                taken += ["not text"] if words[at] == OUT else []
                taken += ["a file"] if value == words[at] else []
                spoilt = (*words[:at], value, *words[at + 1 :], *given)
                yield Case("command line", name, spoilt, what not in taken or None, loop)
        for _ in range(12):
            letters = list(verb + " " + " ".join(words[len(verb.split()) :]))
            at = rng.randrange(len(letters))
            letters[at] = rng.choice("abcxyz-= {[\"'*&!é😀\t")
            yield Case("command line", "a letter changed", tuple("".join(letters).split(" ")), None)


def data_files(rng: random.Random) -> Iterator[Case]:
    """Training data that is no data."""
    for what, text in NOT_JSON.items():
        for name in ("d.json", "d.jsonl", "d.csv", "d.parquet", "d.tsv", "d.txt"):
            refused = True if name.endswith(("json", "jsonl", "parquet", "txt")) else None
            yield Case("data", f"{name} {what}", (*TRAIN, "--data.train", name), refused, write(name, text))
    good = {"question": "Tom has 3 apples.", "answer": "3"}
    for key in good:
        for what, value in VALUES.items():
            refused = what in (
                "null",
                "infinite",
                "NaN",
                "half a character",
                "empty list",
                "list",
                "empty mapping",
                "mapping",
                "empty text",
            )
            change = write("d.jsonl", json.dumps(good) + "\n" + json.dumps({**good, key: value}) + "\n")
            yield Case("data", f"{key} is {what}", (*TRAIN, "--data.train", "d.jsonl"), refused or None, change)
        yield Case(
            "data",
            f"no {key}",
            (*TRAIN, "--data.train", "d.jsonl"),
            True,
            write("d.jsonl", json.dumps({"id": 1, key: "x"})),
        )
    csvs = {
        "no rows": "question,answer\n",
        "a cell more": "question,answer\na,b,c\n",
        "a quote open": 'question,answer\n"a,b\n',
        "a heading twice": "question,question\na,b\n",
        "no headings": "\n\n\n",
        "null byte": "question,answer\na\0,b\n",
    }
    for what, text in csvs.items():
        yield Case(
            "data",
            f"CSV with {what}",
            (*TRAIN, "--data.train", "d.csv"),
            None if what == "null byte" else True,
            write("d.csv", text),
        )
    for what, path in PATHS.items():
        yield Case("data", f"path {what}", (*TRAIN, "--data.train", path), what != "a file" or None, loop)
        yield Case(
            "data",
            f"path {what}.jsonl",
            (*TRAIN, "--data.train", f"{path}.jsonl"),
            None if what == "empty" else True,
            loop,
        )
    for columns in (
        "{question: nowhere}",
        "{nothing: question}",
        "{question: question, answer: question}",
        "{question: 1}",
        "[]",
        "{question: null}",
    ):
        yield Case("data", f"columns {columns}", (*TRAIN, "--data.columns", columns), columns != "[]" or None)
    for _ in range(60):
        yield Case("data", "damaged", (*TRAIN,), None, damage("train.jsonl", rng.getrandbits(32)))


def task_files(rng: random.Random) -> Iterator[Case]:
    """Task files that describe none, and their data."""
    good = {"title": "apples", "kind": "number", "file": "test.jsonl"}
    texts = ("title", "name", "licence", "description")
    for key in (
        "title",
        "kind",
        "file",
        "columns",
        "split",
        "format",
        "size",
        "name",
        "url",
        "blob",
        "local",
        "nothing",
        "licence",
        "description",
    ):
        for what, value in VALUES.items():
            takes = {"columns": ("empty mapping",), "size": ("null", "minus", "zero", "huge", "true"), "file": ()}.get(
                key, ()
            )
            refused: bool | None = what not in takes
            if (
                (key in texts and isinstance(value, str))
                or what in takes
                or (key in ("url", "local", "blob") and isinstance(value, str))
            ):
                refused = None
            text = json.dumps({**good, key: value}).replace("Infinity", ".inf").replace("NaN", ".nan")
            yield Case("task", f"{key} is {what}", MODEL, refused, write("task.yaml", text))
    for what, text in NOT_YAML.items():
        yield Case("task", what, MODEL, True, write("task.yaml", text))
    for what, text in NOT_JSON.items():
        yield Case("task", f"data {what}", MODEL, True, write("test.jsonl", text))
    for what, value in VALUES.items():
        # One label of two that cannot be read is a warning.
        refused = what in (
            "null",
            "infinite",
            "NaN",
            "empty list",
            "list",
            "empty mapping",
            "mapping",
            "half a character",
            "empty text",
        )
        yield Case("task", f"label {what}", MODEL, refused or None, edit("test.jsonl", "answer", value=value))
    for file in ("task.yaml", "test.jsonl"):
        for _ in range(25):
            yield Case("task", f"{file} damaged", MODEL, None, damage(file, rng.getrandbits(32)))


def adapters(rng: random.Random) -> Iterator[Case]:
    """Adapters of others, as `evaluate --adapter` takes them."""
    words = (*MODEL, "--adapter", "run/adapter")
    config, weights = "run/adapter/adapter_config.json", "run/adapter/adapter_model.safetensors"
    for what, change in _wrong_tensors().items():
        for _ in range(4):
            yield Case("adapter", f"weights: {what}", words, True, tensors(weights, change, rng.getrandbits(32)))
    for key in (
        "r",
        "peft_type",
        "target_modules",
        "rank_pattern",
        "lora_alpha",
        "bias",
        "modules_to_save",
        "task_type",
        "layers_to_transform",
        "fan_in_fan_out",
        "use_dora",
        "base_model_name_or_path",
        "lora_dropout",
        "exclude_modules",
        "init_lora_weights",
    ):
        for what, value in VALUES.items():
            refused = (key in ("r", "peft_type") and what != "half") or None
            yield Case("adapter", f"{key} is {what}", words, refused, edit(config, key, value=value))
        yield Case("adapter", f"no {key}", words, True if key == "peft_type" else None, edit(config, key, drop=True))
    yield Case("adapter", "endless pattern", words, True, edit(config, "target_modules", value=r"(\w*\.?)*#"))
    yield Case("adapter", "huge rank", words, True, edit(config, "r", value=10**10))
    for what, text in NOT_JSON.items():
        yield Case("adapter", f"config {what}", words, True, write(config, text))
        yield Case("adapter", f"weights {what}", words, True, write(weights, text))
    yield Case("adapter", "a stranger's code", words, True, _stranger_adapter)
    for what, path in PATHS.items():
        yield Case("adapter", f"path {what}", (*MODEL, "--adapter", path), True, loop)
    for _ in range(40):
        yield Case("adapter", "weights damaged", words, None, damage(weights, rng.getrandbits(32)))
        yield Case("adapter", "config damaged", words, None, damage(config, rng.getrandbits(32)))


def _stranger_adapter(folder: Path) -> None:
    (folder / "run/adapter/adapter_model.safetensors").unlink()
    _pickle("run/adapter/adapter_model.bin")(folder)


def models(rng: random.Random) -> Iterator[Case]:
    """Base models whose files do not fit each other."""
    config, weights = "base/config.json", "base/model.safetensors"
    sizes = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
    )
    for key in (
        *sizes,
        "model_type",
        "rms_norm_eps",
        "hidden_act",
        "rope_parameters",
        "architectures",
        "torch_dtype",
        "tie_word_embeddings",
    ):
        for what, value in VALUES.items():
            refused = (
                key in ("hidden_size", "vocab_size", "intermediate_size") and what not in ("null", "half")
            ) or None
            yield Case("model", f"{key} is {what}", MODEL, refused, edit(config, key, value=value))
    for what, change in _wrong_tensors().items():
        refused = what in ("one missing", "other names", "none at all", "another shape", "flat", "nothing") or None
        for _ in range(2):
            yield Case("model", f"weights: {what}", MODEL, refused, tensors(weights, change, rng.getrandbits(32)))
    for file in (config, weights, "base/tokenizer.json"):
        for what, text in NOT_JSON.items():
            yield Case("model", f"{file} {what}", MODEL, True, write(file, text))
        for _ in range(25):
            yield Case("model", f"{file} damaged", MODEL, None, damage(file, rng.getrandbits(32)))
    for what, text in NOT_JSON.items():
        yield Case("model", f"tokenizer_config.json {what}", MODEL, None, write("base/tokenizer_config.json", text))
        yield Case("model", f"index {what}", MODEL, True, _index(text))
    for shards in ({}, {"a": "nowhere"}, {"a": 5}, {"a": "../../x"}, [], None):
        yield Case("model", f"index of {shards}", MODEL, True, _index(json.dumps({"weight_map": shards})))
    yield Case("model", "a stranger's code", MODEL, True, _stranger_model)
    template = (*MODEL, "--template", "chat")
    for text in (
        "{{ nothing.at.all }}",
        "{% for",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "x",
        "{% for a in range(10**9) %}x{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ messages[9].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages | tojson }}" * 3,
        "",
    ):
        yield Case(
            "model",
            f"chat template {text[:40]!r}",
            template,
            None if "tojson" in text else True,
            write("base/chat_template.jinja", text),
        )


def _index(text: str | bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / "base/model.safetensors").unlink()
        write("base/model.safetensors.index.json", text)(folder)

    return change


def _stranger_model(folder: Path) -> None:
    (folder / "base/model.safetensors").unlink()
    _pickle("base/pytorch_model.bin")(folder)


def legacy(rng: random.Random) -> Iterator[Case]:
    """Checkpoints of the paper's code, as `convert` takes them."""
    for name in ("adapterh", "parallel-learned", "prefix"):
        words = ("convert", f"legacy/{name}", OUT, "--model", "legacy/base")
        config, weights = f"legacy/{name}/adapter_config.json", f"legacy/{name}/adapter_model.bin"
        for what, change in _wrong_tensors().items():
            yield Case(
                "legacy",
                f"{name} weights: {what}",
                words,
                None if what == "one more" else True,
                tensors(weights, change, rng.getrandbits(32)),
            )
        for key in (
            "peft_type",
            "bottleneck_size",
            "non_linearity",
            "target_modules",
            "adapter_dropout",
            "use_parallel_adapter",
            "num_virtual_tokens",
            "scaling",
        ):
            for what, value in VALUES.items():
                yield Case(
                    "legacy",
                    f"{name} {key} is {what}",
                    words,
                    (key == "peft_type") or None,
                    edit(config, key, value=value),
                )
        for what, text in NOT_JSON.items():
            yield Case("legacy", f"{name} config {what}", words, True, write(config, text))
            yield Case("legacy", f"{name} weights {what}", words, True, write(weights, text))
        yield Case("legacy", f"{name} a stranger's code", words, True, _pickle(weights))
        for _ in range(12):
            yield Case("legacy", f"{name} weights damaged", words, None, damage(weights, rng.getrandbits(32)))


def run_folders(rng: random.Random) -> Iterator[Case]:
    """Run folders of others: records, summaries, manifests, configs."""
    place = "run/eval/default"
    records, summary = f"{place}/task.jsonl", f"{place}/summary.json"
    readers = {
        "rescore": ("results", "rescore", "run", "--html"),
        "compare": ("results", "compare", "run", "run"),
        "spread": ("results", "spread", "run", "run"),
    }
    fields = {
        "index": int,
        "question": str,
        "prompt": str,
        "output": str,
        "extracted": object,
        "label": str,
        "correct": bool,
        "finished": bool,
        "tokens": int,
        "skipped": bool,
        "seen": bool,
    }
    for reader, words in readers.items():
        for key, kind in fields.items():
            for what, value in VALUES.items():
                fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
                refused = None if fits else True
                if what in ("infinite", "NaN"):
                    refused = True
                yield Case("run", f"{reader}: {key} is {what}", words, refused, edit(records, key, value=value))
            if key not in ("skipped", "seen"):
                yield Case("run", f"{reader}: no {key}", words, True, edit(records, key, drop=True))
        for path in (
            ("tasks",),
            ("model",),
            ("model", "name"),
            ("protocol",),
            ("template",),
            ("template", "name"),
            ("precision",),
            ("tasks", "task"),
            ("tasks", "task", "accuracy"),
            ("tasks", "task", "interval"),
            ("tasks", "task", "total"),
            ("tasks", "task", "kind"),
        ):
            for what, value in VALUES.items():
                text = isinstance(value, str) and path[-1] in ("name", "precision") and path != ("template", "name")
                number = path[-1] == "accuracy" and what in ("minus", "zero", "half", "huge")
                empty = path == ("tasks",) and what == "empty mapping"
                yield Case(
                    "run",
                    f"{reader}: {'.'.join(path)} is {what}",
                    words,
                    None if text or number or empty else True,
                    edit(summary, *path, value=value),
                )
        for what, text in NOT_JSON.items():
            yield Case("run", f"{reader}: summary {what}", words, True, write(summary, text))
            yield Case("run", f"{reader}: records {what}", words, True, write(records, text))
        for file in (records, summary):
            for _ in range(8):
                yield Case("run", f"{reader}: {file} damaged", words, None, damage(file, rng.getrandbits(32)))
    again = ("evaluate", *EVALUATE)
    for what, text in NOT_JSON.items():
        yield Case("run", f"manifest {what}", again, True, write("run/manifest.json", text))
        yield Case("run", f"note {what}", again, None, write("run/adapter/llm_adapters.json", text))
        yield Case("run", f"journal {what}", again, None, write(f"{place}/.task.partial.jsonl", text))
    for what, text in NOT_YAML.items():
        yield Case("run", f"config {what}", again, True, write("run/config.yaml", text))
    for path in (("data",), ("data", "questions")):
        for what, value in VALUES.items():
            yield Case(
                "run",
                f"manifest {'.'.join(path)} is {what}",
                again,
                None,
                edit("run/manifest.json", *path, value=value),
            )
    for file in ("run/manifest.json", "run/config.yaml"):
        for _ in range(15):
            yield Case("run", f"{file} damaged", again, None, damage(file, rng.getrandbits(32)))


KINDS = (command_lines, recipes, data_files, task_files, adapters, models, legacy, run_folders)


def generate(seed: int, count: int) -> list[Case]:
    """`count` cases, as many of each kind as there are of it by share; the same `seed` gives the same."""
    rng = random.Random(seed)
    every = [list(kind(rng)) for kind in KINDS]
    total = sum(map(len, every))
    chosen = [case for cases in every for case in rng.sample(cases, min(len(cases), -(-count * len(cases) // total)))]
    return rng.sample(chosen, min(count, len(chosen)))


# --- trying them


def preload() -> None:
    """Import what the verbs need, and start no thread: a forked process would lack it."""
    import torch

    torch.set_num_threads(1)
    import docstring_parser  # noqa: F401
    import jsonargparse  # noqa: F401
    import peft  # noqa: F401
    import pooch  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    for name in (
        "api",
        "cli",
        "training.run",
        "training.trainer",
        "evaluation.runner",
        "evaluation.report",
        "legacy",
        "tasks.catalog",
        "inspection",
    ):
        importlib.import_module(f"llm_adapters.{name}")


def forked(work: Callable[[], int], log: Path, seconds: float) -> int | None:
    """Exit code of `work` in a forked process whose streams go to `log`; None where it had to be killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
            sys.stdin = os.fdopen(0, closefd=False)
            try:
                code = work()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
                code = 1
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def judge(case: Case, folder: Path, log: Path) -> list[str]:
    """What was not as it should be with the case, which is tried in `folder`."""
    case.change(folder)
    before = _listed(folder)

    def work() -> int:
        from llm_adapters.cli import main

        os.chdir(folder)
        return main(list(case.words))

    code = forked(work, log, SECONDS)
    text = log.read_text(errors="replace")
    after = _listed(folder)
    faults = []
    if code is None:
        return [f"no end within {SECONDS:g} s"]
    if "Traceback (most recent call last)" in text:
        faults.append("a traceback")
    if code not in (0, 1, 2):
        faults.append(f"exit code {code}")
    if case.refused and code != 2:
        faults.append(f"taken: exit code {code}" if code == 0 else f"exit code {code} instead of 2")
    if code and not text.strip():
        faults.append("no word")
    if left := [name for name in after - before if ".tmp" in name]:
        faults.append(f"left behind: {left}")
    if code == 2 and (made := sorted(name for name in after - before if name.startswith(OUT))):
        faults.append(f"half-written: {made[:3]}")
    if "OWNED" in after:
        faults.append("a stranger's code ran")
    return faults


def _listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def try_all(cases: list[Case], work: Path, show: bool = False) -> dict[str, Any]:
    """Try the `cases` in the folder `work` and tell what was wrong."""
    os.environ.setdefault("LLM_ADAPTERS_CACHE", str(work / "cache"))
    material = work / "material"
    material.mkdir(parents=True)
    log = work / "log"
    preload()
    code = forked(functools.partial(lambda: make_material(material) or 0), log, 300)
    if code != 0:
        raise RuntimeError(f"no material: {log.read_text(errors='replace')[-2000:]}")
    faults, started = [], time.monotonic()
    for number, case in enumerate(cases):
        folder = work / "case"
        shutil.copytree(material, folder, symlinks=True)
        try:
            for fault in judge(case, folder, log):
                last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
                faults.append({"kind": case.kind, "name": case.name, "words": case.words, "fault": fault, "said": last})
                if show:
                    print(json.dumps(faults[-1])[:400], file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if show and number % 100 == 99:
            print(f"{number + 1} of {len(cases)}, {len(faults)} faults", file=sys.stderr, flush=True)
    return {
        "cases": len(cases),
        "must_be_refused": sum(bool(case.refused) for case in cases),
        "kinds": dict(Counter(case.kind for case in cases)),
        "seconds": round(time.monotonic() - started, 1),
        "faults": faults,
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only this kind")
    parser.add_argument("--show", action="store_true", help="tell on stderr as they come")
    asked = parser.parse_args()
    cases = [case for case in generate(asked.seed, asked.cases) if asked.kind in (None, case.kind)]
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as folder, contextlib.chdir(folder):
        result = try_all(cases, Path(folder), asked.show)
    print(json.dumps(result, indent=1))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
