"""The data sets by name: one row each, with its source at a pinned commit and the git blob id of its bytes."""

import dataclasses
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llm_adapters.documents import read_yaml
from llm_adapters.errors import RequestError, first_line, unknown
from llm_adapters.tasks import download, wordproblems
from llm_adapters.tasks.answers import KINDS
from llm_adapters.tasks.answers.languages import LANGUAGES
from llm_adapters.tasks.columns import FIELDS, FORMATS, load_file
from llm_adapters.tasks.examples import Example, Task

logger = logging.getLogger(__name__)

SPLITS = ("test", "train")


_TEST = {"question": "instruction", "input": "input", "response": None, "answer": "answer"}  # `output` is not gold
_TRAIN = {"question": "instruction", "input": "input", "response": "output", "answer": None}
_MAWPS = {"question": "original_text", "input": None, "response": "ans", "answer": "ans"}
_GSM8K = {"question": "question", "input": None, "response": "answer", "answer": "answer"}

_PAPER = ("AGI-Edgerunners/LLM-Adapters", "816657208af4db747803f87ba40a4c71383fed7a")
_OPENAI = ("openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c")

# fmt: off
_TEST_SETS = (  # name, title, kind of answer, folder of dataset/, size, git blob id; what it asks
    ("multiarith", "MultiArith", "number", "MultiArith", 600, "08e996c6cd8c633cc977f5c50709a8bbfc8fadff",
     "arithmetic in two or more steps"),
    ("gsm8k", "GSM8K", "number", "gsm8k", 1319, "57a7a08e10e12e975e1f972d2b8125c0d4c722b1",
     "grade-school mathematics in two to eight steps"),
    ("addsub", "AddSub", "number", "AddSub", 395, "f3996cdf4159b4e1e4b6768865a4db72105f4e2f",
     "addition and subtraction"),
    ("aqua", "AQuA", "letter", "AQuA", 254, "731fbb456f7a93bb4121125de09c4adcf42e5dab",
     "algebra with five choices"),
    ("singleeq", "SingleEq", "number", "SingleEq", 508, "cce7a868400323e30e2094a15d482c1aa743dbb0",
     "problems that are one equation"),
    ("svamp", "SVAMP", "number", "SVAMP", 1000, "98b8f1872db596f8aaff2c95d1d698a9fa13b94f",
     "short problems worded to mislead"),
    ("mawps", "MAWPS", "number", "mawps", 238, "eca473c5b5d398acbae0b84ede833bbbccd63add",
     "arithmetic from several collections"),
    ("mathqa", "MathQA", "letter", "mathqa", 2985, "4395ded7d91bd4fb1192ba3981f6ef00ccc88570",
     "mathematics with five choices"),
    ("boolq", "BoolQ", "boolean", "boolq", 3270, "6d7edb0a8e8a6566b546ccf0d98d24e48db3fdf3",
     "questions that are true or false"),
    ("piqa", "PIQA", "option", "piqa", 1838, "f7a1c260692ef31796d4763cb6334f316a754fed",
     "how things are done, two solutions"),
    ("siqa", "SIQA", "option", "social_i_qa", 1954, "eadf221799ca394367b144c0f86ee0436db409d2",
     "social situations, three answers"),
    ("hellaswag", "HellaSwag", "option", "hellaswag", 10042, "183c4920415f83ba4b793c4873a33e7e10bd1be5",
     "how a scene goes on, four endings"),
    ("winogrande", "WinoGrande", "option", "winogrande", 1267, "21257263593dd4d00546e1918c88ca0f357b08ad",
     "whom a sentence means, two options"),
    ("arc-easy", "ARC-Easy", "option", "ARC-Easy", 2376, "6c0d30aaedaeca148df6bcd7aaacf7c31e6ad70f",
     "school science, the easier part"),
    ("arc-challenge", "ARC-Challenge", "option", "ARC-Challenge", 1172, "9540685439144200b5a7e48dab9ca4655be2af09",
     "school science, the harder part"),
    ("obqa", "OpenBookQA", "option", "openbookqa", 500, "a6e69676104bcb77237388c3b5a3f0dcbb81d1e2",
     "school science with a fact to recall"),
)
_TRAINING_SETS = (  # name, file of ft-training_set/, size, git blob id; what it holds
    ("math-7k", "math_7k", None, "fd93bf268b53bb644b38e71270cdf633951ba3e0",
     "math-10k without MAWPS, whose training split holds questions of the test sets"),
    ("math-10k", "math_10k", 9919, "27dba77d6ed80aa118d78fbafa5cecd651f6d463",
     "GSM8K, AQuA and MAWPS with generated steps: trained the paper's mathematics table"),
    ("math-14k", "math_14k", None, "7dc3a2312d83bd5cd6388ecd5d530f2ff6ed1ad6",
     "math-7k with the steps of two models"),
    ("math-50k", "math_50k", None, "61fcf3e08fc90a922be320441019d6022e25f5d0",
     "a later, experimental mixture"),
    ("math-data", "math_data", 3260, "22a588e69121103120d4b5173f1a6ea804d15a44",
     "the paper's first training set; every item is a question of a test set"),
    ("commonsense-15k", "commonsense_15k", 15119, "3716afef6d384c475dba13f88a5a96c8032dafe2",
     "a sample of commonsense-170k"),
    ("commonsense-170k", "commonsense_170k", 170420, "529e426b33d4cdb1d0c4a275a1a7245ad081fd91",
     "the training splits of the eight commonsense sets"),
    ("alpaca-cleaned", "alpaca_data_cleaned", None, "862cc5fac6f7bad3f16948117f5985c20349f481",
     "general instructions with generated answers, corrected"),
)
# fmt: on


def _source(origin: tuple[str, str], path: str, blob: str, licence: str, local: str = "") -> dict[str, Any]:
    repository, commit = origin
    return {
        "repository": repository,
        "commit": commit,
        "path": path,
        "blob": blob,
        "url": f"https://raw.githubusercontent.com/{repository}/{commit}/{path}",
        "local": local or f"{repository.rpartition('/')[2]}/{path}",
        "licence": licence,
    }


def _paper(path: str, blob: str) -> dict[str, Any]:
    return _source(_PAPER, path, blob, "ODC-By-1.0")


def _rows() -> Iterator[Task]:
    for name, title, kind, folder, size, blob, about in _TEST_SETS:
        source = _paper(f"dataset/{folder}/test.json", blob)
        yield Task(name, title, kind, size=size, columns=_TEST, description=about, **source)
    generated: dict[str, Any] = {"title": "Word problems", "kind": "number", "licence": "Apache-2.0"}
    about = "generated arithmetic; none of its sentences is in its training set"
    yield Task("wordproblems", size=wordproblems.SIZES["test"], description=about, **generated)

    source = _source(
        _OPENAI,
        "grade_school_math/data/train.jsonl",
        "7d97154b91aef28d01c3301741c81ce90039a4b1",
        licence="MIT",
        local="grade-school-math/train.jsonl",
    )
    train: dict[str, Any] = {"split": "train", "columns": _GSM8K, "format": "gsm8k", "size": 7473}
    about = "grade-school mathematics with worked answers"
    yield Task("gsm8k-train", "GSM8K, training split", "number", description=about, **train, **source)
    for name, file, count, blob, about in _TRAINING_SETS:
        source = _paper(f"ft-training_set/{file}.json", blob)
        train = {"split": "train", "columns": _TRAIN, "size": count}
        yield Task(name, file, "text", description=about, **train, **source)
    source = _paper("dataset/mawps/trainset.json", "30ce34399859c115cb391ac96fd009f71f5ba98f")
    train = {"split": "train", "columns": _MAWPS, "size": 1898}
    about = "answers without steps; holds questions of the test sets"
    yield Task("mawps-train", "MAWPS, training split", "number", description=about, **train, **source)
    about = "generated arithmetic with worked answers"
    train = {"split": "train", "size": wordproblems.SIZES["train"]}
    yield Task("wordproblems-train", description=about, **train, **generated)


CATALOG: Mapping[str, Task] = MappingProxyType({task.name: task for task in _rows()})


def get(name: str | os.PathLike[str]) -> Task:
    """Find a task in the catalogue, or read the YAML file that describes one.

    Args:
        name: a name of the catalogue, or the path of a YAML file.

    Raises:
        RequestError: an unknown name, or a YAML file that does not describe a task.
    """
    if task := CATALOG.get(str(name)):
        return task
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return _read_task(Path(name))
    raise unknown("task", name, CATALOG, hint=" Your own task is a path that ends in .yaml.")


def load_task(name: str | os.PathLike[str], *, limit: int | None = None, seed: int | None = None) -> list[Example]:
    """Read the questions of a task with their gold answers.

    Args:
        name: as for `get`.
        limit: keep the first so many.
        seed: shuffle before that; None keeps the order of the file.

    Returns:
        The examples, without responses.

    Raises:
        RequestError: an unknown task, one without gold answers, or a `limit` below 1.
        WorkError: the data is not available, or its bytes are wrong.
    """
    task = get(name)
    _check_limit(limit)
    if task.columns.get("answer", "answer") is None:
        raise RequestError(f"{task.name!r} has no gold answers to judge by: it can only be trained on.")
    examples = [dataclasses.replace(example, response="") for example in _load(task, required={"answer"})]
    if seed is not None:
        order = random.Random(seed)
        examples.sort(key=lambda _: order.random())
    return examples[:limit]


def load_training_data(
    name_or_path: str | os.PathLike[str],
    columns: Mapping[str, str | None] | None = None,
    *,
    limit: int | None = None,
    questions_only: bool = False,
) -> Sequence[Example]:
    """Read a training set of the catalogue, of a task YAML with ``split: train``, or of a person's own file.

    A row without a response is an error in a person's own file; in a set of the catalogue it is left out, and the
    number of such rows is logged.

    Args:
        name_or_path: a name of the catalogue, or the path of a YAML or data file.
        columns: for a person's own file, as `load_file` takes it.
        limit: keep the first so many.
        questions_only: keep every row and need no response, to compare questions and not to train; test sets are
            allowed then.

    Raises:
        RequestError: an unknown name, a test set, a file that cannot be read, or a `limit` below 1.
        WorkError: the data is not available, or its bytes are wrong.
    """
    _check_limit(limit)
    required = set() if questions_only else {"response"}
    name, suffix = str(name_or_path), Path(name_or_path).suffix.lower()
    known = name in CATALOG or suffix in (".yaml", ".yml")
    if not known:
        if not suffix and not _exists(name):
            names = [task.name for task in CATALOG.values() if task.split == "train"]
            raise unknown("training set", name, names, hint=" Your own data is the path of a file.")
        return _first(load_file(name, columns, required=required), limit)
    if columns:
        raise RequestError(f"the column map is for your own files: the columns of {name!r} are known.")
    task = get(name)
    if task.split == "test" and not questions_only:
        raise RequestError(f"{name!r} is a test set: training on it would make its score worthless.")
    if task.file or questions_only:
        return _first(_load(task, required=required), limit)
    examples = _load(task)
    complete = [example for example in examples if example.response.strip()]
    if missing := len(examples) - len(complete):
        logger.warning("%s: %d of %d examples have no response and are left out", name, missing, len(examples))
    return complete[:limit]


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a file's name, or not one at all
        return False


def _first(examples: Sequence[Example], limit: int | None) -> Sequence[Example]:
    return examples if limit is None else examples[:limit]


def _load(task: Task, required: set[str] | None = None) -> Sequence[Example]:
    if task.embedded:
        return wordproblems.generate(task.split)
    return load_file(download.locate(task), task.columns, required=required or (), format=task.format)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise RequestError(f"limit={limit} keeps no example: give 1 or more, or leave it out for all.")


def _read_task(path: Path) -> Task:
    """Task that a YAML file describes; its `file` is relative to the YAML's folder."""
    document = read_yaml(path, "task file")
    if not isinstance(document, dict):
        raise RequestError(
            f"{path} must hold a task: lines such as `title: My task`, `kind: number`, `file: test.jsonl`."
        )
    keys = [key.name for key in dataclasses.fields(Task)]
    defaults = {"name": path.stem, "title": path.stem, "split": "test", "format": "auto", "columns": {}}
    values: dict[str, Any] = defaults | document
    if values["split"] == "train":
        values.setdefault("kind", "text")
    for key, value in values.items():
        if key not in keys:
            raise RequestError(f"{path}: {unknown('key', key, keys)}")
        if key not in ("columns", "size") and not isinstance(value, str):
            raise RequestError(f"{path}: {key} must be a text, not {value!r}.")
    if str(values["name"]).casefold() in CATALOG:
        raise RequestError(f"{path}: the catalogue has a task {values['name']!r}: give this one another `name`.")
    if "kind" not in values:
        raise RequestError(f"{path} does not say what an answer is: add `kind`, one of {', '.join(KINDS)}.")
    allowed_values = (("kind", KINDS), ("split", SPLITS), ("format", FORMATS), ("language", LANGUAGES))
    for key, allowed in allowed_values:
        if key in values and values[key] not in allowed:
            raise RequestError(f"{path}: {unknown(key, values[key], allowed)}")
    if not isinstance(values.get("size"), int | None):
        raise RequestError(f"{path}: size must be a whole number, not {values['size']!r}.")
    columns = values["columns"]
    if not isinstance(columns, dict) or not all(
        isinstance(key, str) and isinstance(name, str | None) for key, name in columns.items()
    ):
        raise RequestError(f"{path}: columns must map some of {', '.join(FIELDS)} to the names of your columns.")
    if bool(values.get("file")) == bool(values.get("url")):
        raise RequestError(f"{path} must say where the data is: either `file`, a path, or `url` with `blob`.")
    if values.get("file"):
        try:
            values["file"] = str(path.parent / Path(values["file"]).expanduser())
        except RuntimeError as error:
            raise RequestError(f"{path}: file {values['file']!r} cannot be found ({first_line(error)}).") from None
    elif not re.fullmatch("https?://.+", values["url"]) or not re.fullmatch("[0-9a-f]{40}", values.get("blob", "")):
        raise RequestError(
            f"{path}: a `url` is an http(s) address and needs `blob`, the 40 digits of `git hash-object`."
        )
    else:
        values.setdefault("local", f"{values['name']}/{values['url'].rpartition('/')[2]}")
        if Path(values["local"]).is_absolute() or ".." in Path(values["local"]).parts:
            raise RequestError(f"{path}: local must stay inside the cache, which {values['local']!r} does not.")
    return Task(**values)
