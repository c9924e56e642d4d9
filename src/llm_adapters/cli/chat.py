"""`llm-adapters chat`: a conversation in the terminal, with a base model, an adapter or a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llm_adapters.tasks.templates import TemplateName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat(
    model: str = "smollm2-135m",
    *,
    adapter: Path | None = None,
    template: TemplateName | None = None,
    max_new_tokens: int = 256,
) -> None:
    """Talk to a base model, an adapter or a run in the terminal; an empty line or Ctrl-D ends it.

    Args:
        model: a run folder, a model folder, a short name or a hub id.
        adapter: an adapter's folder, to go on the model.
        template: the prompt template; by default the adapter's own, or chat for a bare model that has one.
        max_new_tokens: the longest answer, in tokens.
    """
    talk(model, adapter, template=template, max_new_tokens=max_new_tokens)


def talk(model: str, adapter: Path | None, *, template: str | None, max_new_tokens: int) -> None:
    """Read questions from standard input and print answers until an empty line or the end of the input.

    Each question stands alone: that is how the adapters were trained, and how they are evaluated.

    Args:
        model: a run folder, a model folder, a short name or a hub id.
        adapter: an adapter's folder, or None.
        template: the prompt template; None for the adapter's own, else the tokenizer's chat template, else alpaca.
        max_new_tokens: the longest answer, in tokens.

    Raises:
        RequestError: the model or the adapter cannot be loaded, or the template does not fit the tokenizer.
    """
    from llm_adapters.generation import generator as generation
    from llm_adapters.models import loading as models
    from llm_adapters.tasks.templates import encode_prompt, render_prompt

    loaded = models.load(model, adapter)
    fallback = "chat" if getattr(loaded.tokenizer, "chat_template", None) else "alpaca"
    chosen = template or loaded.template or fallback
    render_prompt(chosen, "", tokenizer=loaded.tokenizer)  # a template that does not fit is told before the first word
    asks = sys.stdin.isatty()
    if asks:
        what = f"{loaded.name} with {loaded.adapter}" if loaded.adapter else loaded.name
        print(f"{what}, prompt {chosen}. An empty line ends the conversation.", file=sys.stderr)
    with generation.Generator(loaded.model, loaded.tokenizer, max_new_tokens=max_new_tokens) as generator:
        while True:
            try:
                question = input("you: " if asks else "")
            except EOFError:
                break
            if not question.strip():
                break
            prompt = render_prompt(chosen, question, tokenizer=loaded.tokenizer)
            ids = encode_prompt(loaded.tokenizer, prompt, template=chosen)
            print("model: " if asks else "", end="")
            shown = _Shown(loaded.tokenizer, chosen)
            for _, answer in generator.generate([ids], shown.token):
                shown.end(answer.text)


class _Shown:
    """An answer that appears while it is written; the template says what of the text belongs to the answer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._tokens: list[int] = []
        self._printed = ""

    def token(self, _: int, token: int) -> None:
        """Print what the next token adds; half a character waits for its other half."""
        self._tokens.append(token)
        answer = self._answer(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        if answer.startswith(self._printed) and not answer.endswith("\N{REPLACEMENT CHARACTER}"):
            print(answer[len(self._printed) :], end="", flush=True)
            self._printed = answer

    def end(self, text: str) -> None:
        """Print what is still missing; an answer that turned out to be another one stands on a line of its own."""
        answer = self._answer(text)
        more = answer[len(self._printed) :] if answer.startswith(self._printed) else "\n" + answer
        print(more, flush=True)

    def _answer(self, text: str) -> str:
        from llm_adapters.tasks.templates import response_of

        return response_of(text, self._template)
