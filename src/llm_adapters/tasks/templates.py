"""The one renderer of prompts: training, evaluation, chat and serving all come through here.

For every template but ``paper`` training and evaluation give the model the same prompt tokens, by construction: prompt
and response are tokenised apart, and the response is appended.
"""

import re
from dataclasses import dataclass
from typing import Any

from llm_adapters.errors import RequestError, unknown
from llm_adapters.tasks.examples import Example

TEMPLATES = ("alpaca", "chat", "plain", "paper")
STAGES = ("train", "evaluate")
IGNORED = -100  # the label that cross-entropy skips

# The text of Stanford Alpaca; every prompt ends in a line break, so that no token can span prompt and response.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

# The paper's code writes its prompts in an indented string, blanks included; training and evaluation differ in them.
_INDENT = " " * 16
PAPER = {
    "train": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.  \n\n"
        f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}{{output}}"
    ),
    "train_with_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request. \n\n"
        f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n{_INDENT}### Input:\n{_INDENT}{{input}}\n"
        f"{_INDENT}\n{_INDENT}### Response:\n{_INDENT}{{output}}"
    ),
    "evaluate": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request. \n\n"
        f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Response:\n{_INDENT}"
    ),
    "evaluate_with_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Input:\n{_INDENT}{{input}}\n\n"
        f"{_INDENT}### Response:\n{_INDENT}"
    ),
}

# Where a response that runs on into the next question is cut.
_RUN_ON = {
    "alpaca": re.compile(r"### ?(Instruction|Input|Response):|Below is an instruction that describes a task"),
    "plain": re.compile(r"(^|\n)\s*Question:"),
}


@dataclass(frozen=True)
class Encoded:
    """One training example as tokens: ``len(labels) == len(input_ids)``; `prompt_length` tokens are the prompt's.

    `labels` equal `input_ids` where there is a loss and -100 elsewhere. Both end in the end-of-sequence token.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int


def render_prompt(
    template: str, question: str, input: str = "", *, tokenizer: Any = None, stage: str = "evaluate"
) -> str:
    """The text that goes before the response.

    `tokenizer` is needed only by ``"chat"``, whose words are the tokenizer's own. `stage`, ``"train"`` or
    ``"evaluate"``, makes a difference for ``"paper"`` alone, which keeps every byte of the question; the others trim
    it.

    Raises `RequestError` for an unknown template or stage, and for a tokenizer without a chat template.
    """
    _check(template)
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    if template == "paper":
        return PAPER[f"{stage}_with_input" if input else stage].format(instruction=question, input=input, output="")
    question, input = question.strip(), input.strip()
    if template == "alpaca":
        return (_ALPACA_WITH_INPUT if input else _ALPACA).format(instruction=question, input=input)
    content = f"{question}\n\n{input}" if input else question
    if template == "plain":
        return f"Question: {content}\nAnswer:\n"
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "the template 'chat' needs a tokenizer with a chat template of its own, and this model's has none. "
            f"Choose another template: {', '.join(name for name in TEMPLATES if name != 'chat')}."
        )
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompt(tokenizer: Any, prompt: str, *, template: str) -> list[int]:
    """The tokens of a rendered prompt: BOS once where the tokenizer adds one, and no EOS at the end.

    A chat template writes its special tokens itself, so there the tokenizer adds none and none is taken away.
    """
    _check(template)
    if template == "chat":
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return _without_end(list(tokenizer(prompt)["input_ids"]), tokenizer)


def encode_example(tokenizer: Any, example: Example, *, template: str, train_on_prompt: bool = False) -> Encoded:
    """Prompt, response and EOS as tokens, with labels on the response and EOS, or on all with `train_on_prompt`.

    The response is trimmed, except by ``"paper"``, which tokenises prompt and response as one text, as the paper's code
    does; there `prompt_length` is the length of the prompt tokenised alone.

    Raises `RequestError` for a tokenizer without an EOS token: a model trained without one never stops.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise RequestError("this model's tokenizer has no end-of-sequence token, so a response could not end.")
    prompt = render_prompt(template, example.question, example.input, tokenizer=tokenizer, stage="train")
    prompt_ids = encode_prompt(tokenizer, prompt, template=template)
    if template == "paper":
        input_ids = encode_prompt(tokenizer, prompt + example.response, template=template)
    else:
        response_ids = list(tokenizer(example.response.strip(), add_special_tokens=False)["input_ids"])
        input_ids = prompt_ids + _without_end(response_ids, tokenizer)
    input_ids.append(end)
    length = min(len(prompt_ids), len(input_ids) - 1)
    labels = list(input_ids) if train_on_prompt else [IGNORED] * length + input_ids[length:]
    return Encoded(input_ids, labels, length)


def response_of(text: str, template: str) -> str:
    """The response in what a model generated, trimmed and cut where it runs on into a next question.

    `text` is the generated continuation; for ``"paper"`` it is the whole decoded text, prompt and all, and the response
    is what stands between the first ``### Response:`` and the next, if there is one, as in the paper's code.
    """
    _check(template)
    if template == "paper":
        _, mark, rest = text.partition("### Response:")
        return (rest if mark else text).partition("### Response:")[0].strip()
    run_on = _RUN_ON.get(template)
    found = run_on.search(text) if run_on else None
    return (text[: found.start()] if found else text).strip()


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """`ids` without EOS at the end: some tokenizers add it unasked, and some data writes it into the text."""
    end = len(ids)
    while end and ids[end - 1] == tokenizer.eos_token_id:
        end -= 1
    return ids[:end]


def _check(template: str) -> None:
    if template not in TEMPLATES:
        raise unknown("template", template, TEMPLATES)
