"""`llm-adapters chat`: a conversation in the terminal, with a base model, an adapter or a run."""

import functools
import sys
from pathlib import Path

from llm_adapters.compat.jsonargparse import Count
from llm_adapters.errors import harmless
from llm_adapters.tasks.templates import TemplateName


def chat(
    model: str = "smollm2-135m",
    *,
    adapter: Path | None = None,
    template: TemplateName | None = None,
    max_new_tokens: Count = 256,
    allow_untrained: bool = False,
    allow_other_base: bool = False,
) -> None:
    """Talk to a base model, an adapter or a run in the terminal; an empty line or Ctrl-D ends it.

    Each question is asked by itself, without those before: that is how the adapters were trained and are evaluated.

    Args:
        model: a run folder, a model folder, a short name or a hub id.
        adapter: an adapter's folder, to go on the model.
        template: the prompt template; by default the adapter's own, or chat for a bare model that has one.
        max_new_tokens: the longest answer, in tokens.
        allow_untrained: talk to an adapter that does nothing, too.
        allow_other_base: put an adapter on other weights than those that it was trained on, too.

    Raises:
        RequestError: the model or the adapter cannot be loaded, or the template does not fit the tokenizer.
    """
    from llm_adapters.generation import generator as generation
    from llm_adapters.generation.streaming import TextStream
    from llm_adapters.models import loading as models
    from llm_adapters.models.untrained import check_trained
    from llm_adapters.tasks.templates import encode_prompt, render_prompt, response_of

    loaded = models.load(model, adapter, allow_other_base=allow_other_base)
    if not allow_untrained:
        check_trained(loaded.model, str(loaded.adapter))
    fallback = "chat" if getattr(loaded.tokenizer, "chat_template", None) else "alpaca"
    chosen = template or loaded.template or fallback
    render_prompt(chosen, "", tokenizer=loaded.tokenizer)  # a template that does not fit is told before the first word
    response = functools.partial(response_of, template=chosen)
    show = functools.partial(print, end="", flush=True)
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
            show("model: " if terminal else "")
            stream = TextStream(loaded.tokenizer, response)

            def show_token(_: int, token: int, stream: TextStream = stream) -> None:
                show(harmless(stream.add(token)))

            for _, answer in generator.generate([ids], show_token):
                print(harmless(stream.finish(answer.text)), flush=True)
