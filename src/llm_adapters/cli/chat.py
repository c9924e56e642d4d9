"""`llm-adapters chat`: a conversation in the terminal, with a base model, an adapter or a run."""

import dataclasses
import functools
import sys
from pathlib import Path

from llm_adapters.compat.jsonargparse import Count, NotNegative, Positive, Seed
from llm_adapters.errors import harmless
from llm_adapters.tasks.templates import TemplateName


def chat(
    model: str = "smollm2-135m",
    *,
    adapter: Path | None = None,
    template: TemplateName | None = None,
    max_new_tokens: Count = 256,
    temperature: NotNegative = 0.0,
    top_p: Positive = 1.0,
    top_k: int = 0,
    seed: Seed = 0,
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
        temperature: 0 takes the most probable token; above 0, tokens are drawn, the more evenly the higher it is.
        top_p: draw from the most probable tokens that together have this probability.
        top_k: draw from so many most probable tokens; 0 for all.
        seed: of the random numbers, for the first question; the next one's is larger by one.
        allow_untrained: talk to an adapter that does nothing, too.
        allow_other_base: put an adapter on other weights than those that it was trained on, too.

    Raises:
        RequestError: the model or the adapter cannot be loaded, the template does not fit the tokenizer, or the numbers
            of the sampling make no sense.
    """
    from llm_adapters.generation import generator as generation
    from llm_adapters.generation.sampling_params import SamplingParams
    from llm_adapters.generation.streaming import TextStream
    from llm_adapters.models import loading as models
    from llm_adapters.models.untrained import check_trained
    from llm_adapters.tasks.templates import encode_prompt, render_prompt, response_of

    sampling = SamplingParams(temperature, top_p, top_k, seed=seed)
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

            for _, answer in generator.generate([ids], show_token, **dataclasses.asdict(sampling)):
                print(harmless(stream.finish(answer.text)), flush=True)
            if not sampling.greedy:  # a question that is asked again is answered anew
                sampling = dataclasses.replace(sampling, seed=sampling.seed + 1)
