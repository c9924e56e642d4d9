"""The one renderer of prompts: training, evaluation, chat and serving all come through here. A template is one row.

For every template but a joint one (``paper``), training and evaluation give the model the same prompt tokens, by
construction: prompt and response are tokenised apart, and the response is appended.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal

from llm_adapters.errors import RequestError, unknown
from llm_adapters.tasks import chat_templates
from llm_adapters.tasks.answers.stop import truncate_at_stop
from llm_adapters.tasks.examples import Example, Message
from llm_adapters.tasks.tokens import Span, control_tokens, encode

TemplateName = Literal["alpaca", "chat", "plain", "paper"]  # the keys of TEMPLATES, for typed signatures
STAGES = ("train", "evaluate")
IGNORED = -100  # the label that cross-entropy skips


class Prompt(str):
    """Text of a prompt, with the places of what is not the template's.

    Attributes:
        words: the spans that are the data's words: text that looks like a control token there stays text.
        replies: the spans of the assistant's earlier turns, each up to where its turn ends.
    """

    words: tuple[Span, ...]
    replies: tuple[Span, ...]

    def __new__(cls, text: str, words: Sequence[Span] = (), replies: Sequence[Span] = ()) -> "Prompt":
        """Make one of `text` and its spans."""
        prompt = super().__new__(cls, text)
        prompt.words, prompt.replies = tuple(words), tuple(replies)
        return prompt


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

    def text(self, question: str, input: str, stage: str) -> Prompt:
        """Prompt of a question, before any chat template.

        Args:
            question: what is asked.
            input: a text that the question is about, empty for none.
            stage: ``"train"`` or ``"evaluate"``.
        """
        prompts = (self.train if stage == "train" else None) or (self.prompt, self.prompt_with_input)
        if not self.joint:
            question, input = question.strip(), input.strip()
        text, words = "", []
        for own, slot, _, _ in Formatter().parse(prompts[bool(input)]):
            text += own
            if slot:
                value = {"instruction": question, "input": input}[slot]
                words.append((len(text), len(text) + len(value)))
                text += value
        return Prompt(text, words)


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
    template: str,
    question: str,
    input: str = "",
    *,
    tokenizer: Any = None,
    stage: str = "evaluate",
    history: Sequence[Message] = (),
) -> Prompt:
    """Text that goes before the response.

    Args:
        template: one of `TEMPLATES`.
        question: what is asked.
        input: a text that the question is about, empty for none.
        tokenizer: needed where the template is the tokenizer's own (``"chat"``).
        stage: ``"train"`` or ``"evaluate"``, which makes a difference for ``"paper"`` alone.
        history: the messages before the question, for which ``"chat"`` alone has a place.

    Raises:
        RequestError: an unknown template or stage, a tokenizer without a chat template, or one whose template fails or
            leaves a message out, or messages before the question and no place for them.
    """
    row = get_template(template)
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    text = row.text(question, input, stage)
    if not row.wrapped:
        if history:
            raise RequestError(
                f"the template {template!r} has no place for what comes before a question (a system message, earlier "
                "turns). Choose the template chat, or leave them out: --data.columns '{system: null, history: null}'."
            )
        return text
    if not getattr(tokenizer, "chat_template", None):
        others = ", ".join(other.name for other in TEMPLATES.values() if not other.wrapped)
        raise RequestError(
            f"the template {template!r} needs a tokenizer with a chat template of its own, and this model's has none. "
            f"Choose another template: {others}."
        )
    return _render_chat(tokenizer, [*history, ("user", text)])


def _render_chat(tokenizer: Any, messages: Sequence[Message]) -> Prompt:
    text = chat_templates.render(tokenizer, messages)
    replies = []
    for at, (role, content) in enumerate(messages):
        if role == "assistant":
            before = chat_templates.render(tokenizer, messages[:at])
            after = chat_templates.render(tokenizer, messages[: at + 1], reply=False).rstrip()
            if not (text.startswith(before) and text.startswith(after) and content.strip() in after[len(before) :]):
                raise RequestError(
                    f"the tokenizer's chat template does not keep the turn {content.strip()[:60]!r} as it was, so that "
                    "it cannot be trained on. Leave earlier turns out, or choose another model."
                )
            replies.append((len(before), len(after)))
    return Prompt(text, _places(tokenizer, text, messages), replies)


def _places(tokenizer: Any, text: str, messages: Sequence[Message]) -> list[Span]:
    """Spans of the messages' contents in their rendered `text`; none where no content looks like a control token."""
    pattern = control_tokens(tokenizer)
    if pattern is None or not any(pattern.search(content) for _, content in messages):
        return []
    # Rendered with other words, the template's own text is what is left: a content may look like it.
    masks = [f"content{at}of{len(messages)}" for at in range(len(messages))]
    own = chat_templates.render(tokenizer, [(role, mask) for (role, _), mask in zip(messages, masks, strict=True)])
    spans, end = [], 0
    for mask, (_, content) in zip(masks, messages, strict=True):
        before, found, own = own.partition(mask)
        start = end + len(before) if found else text.find(content.strip(), end)
        if text[start : start + len(content)] != content:  # trimmed by the template
            content = content.strip()
            start = max(text.find(content, start), end)
        end = start + len(content)
        spans.append((start, end))
    return spans


def encode_prompt(tokenizer: Any, prompt: str, *, template: str) -> list[int]:
    """Tokens of a rendered prompt: BOS once where the tokenizer adds one, and no EOS at the end.

    A chat template writes its special tokens itself, so there the tokenizer adds none and none is taken away. Earlier
    turns of the assistant are tokenised apart, as responses are.

    Args:
        tokenizer: the model's.
        prompt: what `render_prompt` returned.
        template: the template that rendered it.

    Raises:
        RequestError: an unknown template.
    """
    return [token for ids, _ in _pieces(tokenizer, prompt, template) for token in ids]


def _pieces(tokenizer: Any, prompt: str, template: str) -> list[tuple[list[int], bool]]:
    """Tokens of a prompt piece by piece, and whether each is an earlier turn of the assistant."""
    words, replies = getattr(prompt, "words", ()), getattr(prompt, "replies", ())
    if not get_template(template).wrapped:
        return [(_without_end(encode(tokenizer, prompt, words, add_special_tokens=True), tokenizer), False)]
    edges = [0, *(edge for span in replies for edge in span), len(prompt)]
    return [
        (
            encode(tokenizer, prompt[start:end], [(a - start, b - start) for a, b in words if start <= a < end]),
            bool(odd % 2),
        )
        for odd, (start, end) in enumerate(itertools.pairwise(edges))
    ]


def encode_example(tokenizer: Any, example: Example, *, template: str, train_on_prompt: bool = False) -> Encoded:
    """Prompt, response and EOS as tokens, with labels on the response and EOS, and on earlier turns of the assistant.

    Args:
        tokenizer: the model's.
        example: question and response. The response is trimmed, except where the template is joint: there prompt and
            response are tokenised as one text, and `Encoded.prompt_length` is that of the prompt tokenised alone. An
            end-of-sequence token that the data writes at the end of a response stands for the end.
        template: one of `TEMPLATES`.
        train_on_prompt: labels on all tokens.

    Raises:
        RequestError: an unknown template, or a tokenizer without an EOS token: a model trained without never stops.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise RequestError("this model's tokenizer has no end-of-sequence token, so a response could not end.")
    prompt = render_prompt(
        template, example.question, example.input, tokenizer=tokenizer, stage="train", history=example.history
    )
    pieces = _pieces(tokenizer, prompt, template)
    prompt_ids = [token for ids, _ in pieces for token in ids]
    prompt_labels = [token if reply else IGNORED for ids, reply in pieces for token in ids]
    response = _without_end_text(example.response, tokenizer)
    if get_template(template).joint:
        words = [*prompt.words, (len(prompt), len(prompt) + len(response))]
        input_ids = _without_end(encode(tokenizer, prompt + response, words, add_special_tokens=True), tokenizer)
    else:
        response = response.strip()
        response_ids = encode(tokenizer, response, [(0, len(response))])
        input_ids = prompt_ids + _without_end(response_ids, tokenizer)
    input_ids.append(end)
    length = min(len(prompt_ids), len(input_ids) - 1)
    labels = list(input_ids) if train_on_prompt else prompt_labels[:length] + input_ids[length:]
    return Encoded(input_ids, labels, length)


def holds_control_tokens(tokenizer: Any, example: Example) -> bool:
    """Tell if the words of an example hold what the tokenizer takes for a control token; they are encoded as text.

    Args:
        tokenizer: the model's.
        example: the example.
    """
    pattern = control_tokens(tokenizer)
    texts = [example.question, example.input, _without_end_text(example.response, tokenizer)]
    texts += [content for _, content in example.history]
    return pattern is not None and any(pattern.search(text) for text in texts)


def clock(template: str) -> str | None:
    """Date that prompts of a template are told, as ISO 8601; None where they cannot ask.

    Args:
        template: one of `TEMPLATES`.

    Raises:
        RequestError: an unknown template.
    """
    return chat_templates.DATE.date().isoformat() if get_template(template).wrapped else None


def response_of(text: str, template: str) -> str:
    """Response in what a model generated, trimmed and cut where it runs on into a next question.

    Args:
        text: the generated continuation of a prompt.
        template: the template of that prompt.

    Raises:
        RequestError: an unknown template.
    """
    return truncate_at_stop(text, get_template(template).stop)


def _without_end_text(response: str, tokenizer: Any) -> str:
    """Response without an EOS that the data writes at its end."""
    end = str(tokenizer.eos_token)
    while response.rstrip().endswith(end):
        response = response.rstrip().removesuffix(end)
    return response


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Token ids without EOS at the end: some tokenizers add it unasked."""
    end = len(ids)
    while end and ids[end - 1] == tokenizer.eos_token_id:
        end -= 1
    return ids[:end]
