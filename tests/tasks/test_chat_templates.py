import pytest
from tiny import tiny_tokenizer

from llm_adapters.errors import RequestError
from llm_adapters.tasks import chat_templates
from llm_adapters.tasks.chat_templates import render

TURNS = [("system", "Be brief."), ("user", " 1 +\n 1? ")]


def with_template(text):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def test_a_template_that_asks_for_the_date_is_told_always_the_same():
    tokenizer = with_template("{{ strftime_now('%Y-%m-%d') }}{% for m in messages %} {{ m.content }}{% endfor %}")
    assert render(tokenizer, TURNS) == "2024-07-26 Be brief.  1 +\n 1? "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1].content }}", "leaves out what the system says: 'Be brief.'"),
        ("{{ messages[0].content }} {{ messages[-1].content[:3] }}", "leaves out what the user says"),
        ("{% for m in messages if m.role == 'tool' %}{{ m.content }}{% endfor %}", "leaves out what the system"),
        ("{{ raise_exception('only one user turn') }}", r"cannot be rendered \(only one user turn\)"),
        ("{% if messages %}", "cannot be rendered"),
        ("{{ 1 / 0 }}", r"cannot be rendered \(division by zero\)"),
        ("{{ tools.first.name }}", "cannot be rendered"),
        ("{{ messages[0].content.__class__.__mro__ }}", "cannot be rendered"),
        ("{{ messages|undefined_filter }}", "cannot be rendered"),
        ("{{ 'ab' * 900000 }}{{ messages[0].content }}{{ messages[1].content }}", "makes 1800018 characters"),
        ("{{ ('ab' * 4000000000)|length }}", "takes too much memory"),
    ],
)
def test_what_a_template_does_wrong_is_a_request_error(template, message):
    with pytest.raises(RequestError, match=message):
        render(with_template(template), TURNS)


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 0.2)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match="takes more than 0"):
        render(with_template(loops), TURNS)
