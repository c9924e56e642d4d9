"""Insertion of an adapter into a model, once its options are known to be within bounds.

Options come from recipes and from adapters of other people: a regular expression that never ends and a rank that no
memory holds are found before PEFT gets them, and whatever PEFT raises about the rest is a `RequestError`.
"""

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llm_adapters.errors import RequestError, WorkError, first_line, from_system, shortened
from llm_adapters.models import starts, targets
from llm_adapters.models.memory import free_memory

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

SECONDS = 5.0  # for all patterns and all names; ordinary ones take milliseconds
# An adapter's size is a product of the model's sizes and these numbers: below it, it is smaller than the model.
_ORDINARY = 1000
_SIZES_OF_THE_MODEL = frozenset({"token_dim", "num_layers", "num_attention_heads"})
TRAINED = 4 * (2 + 2)  # bytes of a trained parameter in float32, its gradient, and AdamW's two numbers
LOADED = 4  # of one that is only used

# In a process of its own, since Python's regular expressions cannot be interrupted everywhere. The forms are PEFT's.
_MATCHER = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        forms = [re.compile(form % pattern) for form in (r"%s", r"(.*\.)?(%s)$", r".*\.%s\.(\d+)\.")]
    except (re.error, OverflowError, RecursionError) as error:
        sys.exit(json.dumps([pattern, str(error)]))
    print(json.dumps(pattern), flush=True)
    for name in names:
        for form in forms:
            form.fullmatch(name), form.match(name)
"""


def insert(model: Any, config: "PeftConfig", **options: Any) -> "PeftModel":
    """Put a new adapter on `model`.

    Args:
        model: the model; one on the meta device takes an adapter of any size.
        config: the adapter's options.
        options: further ones of PEFT's `get_peft_model`.

    Raises:
        RequestError: the options do not fit the model, name a part that it does not have, ask for more memory than is
            free, hold a pattern that is none or takes too long, or want a start that cannot be saved.
    """
    from peft import get_peft_model

    starts.check_start(config)
    check_patterns(model, config)
    check_memory(model, config)
    asked = copy.deepcopy(config)
    try:
        adapted = get_peft_model(model, config, **options)
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # PEFT raises many kinds, all about its options
        if isinstance(told := from_system(error), WorkError):
            raise told from error
        raise RequestError(f"the adapter does not fit the model: {first_line(error)}") from error
    if found := targets.unmatched(adapted, asked):
        raise RequestError(f"{found[0]}.")
    starts.keep_start(adapted)
    return adapted


def check_patterns(model: "nn.Module", config: "PeftConfig") -> None:
    """Match the regular expressions among an adapter's options with the names of the model's modules, within a limit.

    Raises:
        RequestError: one is no regular expression, or takes longer than `SECONDS`.
    """
    patterns = list(dict.fromkeys(_patterns(vars(config))))
    if not any(_is_special(pattern) for pattern in patterns):
        return
    asked = json.dumps([patterns, [name for name, _ in model.named_modules()]])
    command = [sys.executable, "-I", "-c", _MATCHER]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        seen = (error.stdout or b"").decode(errors="replace").splitlines()
        slow = json.loads(seen[-1]) if seen else patterns[0]
        raise RequestError(
            f"the pattern '{shortened(slow, 80)}' takes longer than {SECONDS:g} s on the names of the model's modules: "
            "write it without a repetition inside a repetition, or list the modules"
        ) from None
    if done.returncode:
        pattern, reason = json.loads(done.stderr)
        raise RequestError(f"'{shortened(pattern, 80)}' is not a regular expression: {reason}")


def _patterns(options: dict[str, Any]) -> Iterator[str]:
    """Options that PEFT takes for regular expressions: a text for modules, and the keys of what is called a pattern."""
    for name, value in options.items():
        if name.endswith("_modules") and isinstance(value, str):
            yield value
        elif name.endswith("_pattern"):
            found = value if isinstance(value, dict | list) else [value]
            yield from (pattern for pattern in found if isinstance(pattern, str))


def _is_special(pattern: str) -> bool:
    return any(sign in pattern for sign in "*+?{}()[]|^$\\")


def check_memory(model: Any, config: "PeftConfig", size: int = TRAINED) -> None:
    """Compare what the adapter takes with the memory that is free, before it is allocated.

    Only where a number among the options is so large that it matters.

    Args:
        model: the model that it is for.
        config: its options.
        size: bytes that each of its parameters takes: `TRAINED` or `LOADED`.

    Raises:
        RequestError: it takes more; the message has both sizes.
    """
    if all(number < _ORDINARY for number in _numbers(vars(config))):
        return
    import torch
    from transformers import AutoModelForCausalLM

    device = next(model.parameters()).device
    if device.type == "meta":
        return
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = copy.deepcopy(config)
            options.inference_mode = False
            trainable = count_trainable(AutoModelForCausalLM.from_config(model.config), options)
    except Exception:  # what is wrong with it, the insertion tells
        return
    needed, free = trainable * size, free_memory(device)
    if needed > free:
        raise RequestError(
            f"the adapter has {trainable:,} parameters: they take {needed / 1e9:,.1f} GB, and "
            f"{free / 1e9:,.1f} GB are free. Take a smaller rank or size, or fewer modules"
        )


def count_trainable(model: Any, config: "PeftConfig") -> int:
    """Number of parameters that the adapter would train on `model`, which is on the meta device and is changed."""
    from peft import get_peft_model

    adapted = get_peft_model(model, config, low_cpu_mem_usage=not config.is_prompt_learning)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _numbers(options: Any) -> Iterator[float]:
    if isinstance(options, dict):
        for name, value in options.items():
            if name not in _SIZES_OF_THE_MODEL:
                yield from _numbers(value)
    elif isinstance(options, list | tuple | set):
        for value in options:
            yield from _numbers(value)
    elif isinstance(options, int | float) and not isinstance(options, bool):
        yield abs(options)
