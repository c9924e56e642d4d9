"""`llm-adapters chat`: a conversation in the terminal, with a base model, an adapter or a run."""

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llm_adapters.tasks.templates import TemplateName

if TYPE_CHECKING:
    from llm_adapters.generation.streaming import TextStream


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

    Each question is asked by itself, without those before, as in training and evaluation.

    Args:
        model: a run folder, a model folder, a short name or a hub id.
        adapter: an adapter's folder, or None.
        template: the prompt template; None for the adapter's own, else the tokenizer's chat template, else alpaca.
        max_new_tokens: the longest answer, in tokens.

    Raises:
        RequestError: the model or the adapter cannot be loaded, or the template does not fit the tokenizer.
    """
    from llm_adapters.generation import generator as generation
    from llm_adapters.generation.streaming import TextStream
    from llm_adapters.models import loading as models
    from llm_adapters.tasks.templates import encode_prompt, render_prompt, response_of

    loaded = models.load(model, adapter)
    fallback = "chat" if getattr(loaded.tokenizer, "chat_template", None) else "alpaca"
    chosen = template or loaded.template or fallback
    render_prompt(chosen, "", tokenizer=loaded.tokenizer)  # a template that does not fit is told before the first word
    terminal = sys.stdin.isatty()
    if terminal:
        what = f"{loaded.name} with {loaded.adapter}" if loaded.adapter else loaded.name
        print(f"{what}, prompt {chosen}. An empty line ends the conversation.", file=sys.stderr)
    with generation.Generator(loaded.model, loaded.tokenizer, max_new_tokens=max_new_tokens) as generator:
        while True:
            try:
                question = input("you: " if terminal else "")
            except EOFError:
                break
            if not question.strip():
                break
            prompt = render_prompt(chosen, question, tokenizer=loaded.tokenizer)
            ids = encode_prompt(loaded.tokenizer, prompt, template=chosen)
            print("model: " if terminal else "", end="")
            stream = TextStream(loaded.tokenizer, functools.partial(response_of, template=chosen))
            for _, answer in generator.generate([ids], functools.partial(_show, stream)):
                print(stream.finish(answer.text), flush=True)


def _show(stream: "TextStream", _: int, token: int) -> None:
    print(stream.add(token), end="", flush=True)
