"""The one renderer of prompts: training, evaluation, chat and serving all come through here. A template is one row.

For every template but a joint one (``paper``), training and evaluation give the model the same prompt tokens, by
construction: prompt and response are tokenised apart, and the response is appended.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llm_adapters.errors import RequestError, unknown
from llm_adapters.tasks.answers.stop import truncate_at_stop
from llm_adapters.tasks.examples import Example

TemplateName = Literal["alpaca", "chat", "plain", "paper"]  # the keys of TEMPLATES, for typed signatures
STAGES = ("train", "evaluate")
IGNORED = -100  # the label that cross-entropy skips


@dataclass(frozen=True)
class Template:
    """Way to write a question down for a model.

    Attributes:
        name: as on the command line and in a recipe.
        prompt: the text before the response, with the slot ``{instruction}``.
        prompt_with_input: the same for a question with an input, with the slot ``{input}`` too.
        train: the two prompts of training where they are not those of evaluation.
        stop: a regular expression for the words that begin a next question, where a response is cut; None for none.
        wrapped: the prompt is the user's message in the tokenizer's own chat template, which writes special tokens.
        joint: prompt and response are trimmed nowhere and tokenised as one text.
    """

    name: TemplateName
    prompt: str
    prompt_with_input: str
    train: tuple[str, str] | None = None
    stop: str | None = None
    wrapped: bool = False
    joint: bool = False

    def text(self, question: str, input: str, stage: str) -> str:
        """Prompt of a question, before any chat template.

        Args:
            question: what is asked.
            input: a text that the question is about, empty for none.
            stage: ``"train"`` or ``"evaluate"``.
        """
        prompts = (self.train if stage == "train" else None) or (self.prompt, self.prompt_with_input)
        if not self.joint:
            question, input = question.strip(), input.strip()
        return prompts[bool(input)].format(instruction=question, input=input)


# The paper's code writes its prompts in an indented string, blanks included.
_INDENT = " " * 16

_ROWS = (
    # The text of Stanford Alpaca; prompts end in a line break, so that no token can span prompt and response.
    Template(
        "alpaca",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        stop=r"### ?(Instruction|Input|Response):|Below is an instruction that describes a task",
    ),
    Template("chat", "{instruction}", "{instruction}\n\n{input}", wrapped=True),
    Template(
        "plain",
        "Question: {instruction}\nAnswer:\n",
        "Question: {instruction}\n\n{input}\nAnswer:\n",
        stop=r"(^|\n)\s*Question:",
    ),
    Template(
        "paper",
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request. \n\n"
        f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Response:\n{_INDENT}",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Input:\n{_INDENT}{{input}}\n\n"
        f"{_INDENT}### Response:\n{_INDENT}",
        train=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.  \n\n"
            f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request. \n\n"
            f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n{_INDENT}### Input:\n{_INDENT}{{input}}\n"
            f"{_INDENT}\n{_INDENT}### Response:\n{_INDENT}",
        ),
        stop="### Response:",
        joint=True,
    ),
)
TEMPLATES: Mapping[str, Template] = {row.name: row for row in _ROWS}


def get_template(name: str) -> Template:
    """Row of the template called `name`.

    Args:
        name: one of `TEMPLATES`.

    Raises:
        RequestError: there is no such template.
    """
    if name not in TEMPLATES:
        raise unknown("template", name, TEMPLATES)
    return TEMPLATES[name]


@dataclass(frozen=True)
class Encoded:
    """One training example as tokens, as many labels as input ids; both end in the end-of-sequence token.

    Attributes:
        input_ids: the tokens of prompt and response.
        labels: `input_ids` where there is a loss, -100 elsewhere.
        prompt_length: how many of the tokens are the prompt's.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int


def render_prompt(
    template: str, question: str, input: str = "", *, tokenizer: Any = None, stage: str = "evaluate"
) -> str:
    """Text that goes before the response.

    Args:
        template: one of `TEMPLATES`.
        question: what is asked.
        input: a text that the question is about, empty for none.
        tokenizer: needed where the template is the tokenizer's own (``"chat"``).
        stage: ``"train"`` or ``"evaluate"``, which makes a difference for ``"paper"`` alone.

    Raises:
        RequestError: an unknown template or stage, or a tokenizer without a chat template.
    """
    row = get_template(template)
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    text = row.text(question, input, stage)
    if not row.wrapped:
        return text
    if not getattr(tokenizer, "chat_template", None):
        others = ", ".join(other.name for other in TEMPLATES.values() if not other.wrapped)
        raise RequestError(
            f"the template {template!r} needs a tokenizer with a chat template of its own, and this model's has none. "
            f"Choose another template: {others}."
        )
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompt(tokenizer: Any, prompt: str, *, template: str) -> list[int]:
    """Tokens of a rendered prompt: BOS once where the tokenizer adds one, and no EOS at the end.

    A chat template writes its special tokens itself, so there the tokenizer adds none and none is taken away.

    Args:
        tokenizer: the model's.
        prompt: what `render_prompt` returned.
        template: the template that rendered it.

    Raises:
        RequestError: an unknown template.
    """
    if get_template(template).wrapped:
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return _without_end(list(tokenizer(prompt)["input_ids"]), tokenizer)


def encode_example(tokenizer: Any, example: Example, *, template: str, train_on_prompt: bool = False) -> Encoded:
    """Prompt, response and EOS as tokens, with labels on the response and EOS.

    Args:
        tokenizer: the model's.
        example: question and response. The response is trimmed, except where the template is joint: there prompt and
            response are tokenised as one text, and `Encoded.prompt_length` is that of the prompt tokenised alone.
        template: one of `TEMPLATES`.
        train_on_prompt: labels on all tokens.

    Raises:
        RequestError: an unknown template, or a tokenizer without an EOS token: a model trained without never stops.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise RequestError("this model's tokenizer has no end-of-sequence token, so a response could not end.")
    prompt = render_prompt(template, example.question, example.input, tokenizer=tokenizer, stage="train")
    prompt_ids = encode_prompt(tokenizer, prompt, template=template)
    if get_template(template).joint:
        input_ids = encode_prompt(tokenizer, prompt + example.response, template=template)
    else:
        response_ids = list(tokenizer(example.response.strip(), add_special_tokens=False)["input_ids"])
        input_ids = prompt_ids + _without_end(response_ids, tokenizer)
    input_ids.append(end)
    length = min(len(prompt_ids), len(input_ids) - 1)
    labels = list(input_ids) if train_on_prompt else [IGNORED] * length + input_ids[length:]
    return Encoded(input_ids, labels, length)


def response_of(text: str, template: str) -> str:
    """Response in what a model generated, trimmed and cut where it runs on into a next question.

    Args:
        text: the generated continuation of a prompt.
        template: the template of that prompt.

    Raises:
        RequestError: an unknown template.
    """
    return truncate_at_stop(text, get_template(template).stop)


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Token ids without EOS at the end: some tokenizers add it unasked, and some data writes it into the text."""
    end = len(ids)
    while end and ids[end - 1] == tokenizer.eos_token_id:
        end -= 1
    return ids[:end]
