from datetime import date

import pytest
from jinja2 import Environment
from transformers import AutoTokenizer

from orpo_cli.data.formats import Drop, Message
from orpo_cli.data.templates import (
    BUILT_IN,
    fit_tokenizer,
    render,
    require_offsets,
    resolve_template,
)
from orpo_cli.errors import ModelError
from tests.shared import shared

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
]

# Templates in the manner of well-known ones, written for these tests.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)


def load(name: str):
    return AutoTokenizer.from_pretrained(str(shared(name)))


def gpt2():
    return load("tokenizers/gpt2")


def from_file(tmp_path, tokenizer, source, **options):
    path = tmp_path / "template.jinja"
    path.write_text(source, encoding="utf-8")
    return resolve_template(str(path), tokenizer, **{"kwargs": {}, **options})


def fitted(tmp_path, tokenizer, source, **options):
    template = from_file(tmp_path, tokenizer, source, **options)
    fit_tokenizer(tokenizer, template)
    return template


# What the built-in templates write


def test_plain_is_the_documented_text():
    tokenizer = gpt2()
    fit_tokenizer(tokenizer, resolve_template("plain", tokenizer, kwargs={}))
    stock = tokenizer.apply_chat_template
    assert stock(DIALOGUE, tokenize=False, add_generation_prompt=True) == (
        "Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Who?\n\nAssistant:"
    )
    answered = [*DIALOGUE[1:2], {"role": "assistant", "content": "Hello"}]
    assert stock(answered, tokenize=False) == "User: Hi\n\nAssistant: Hello<|endoftext|>"


def test_chatml_and_llama3_are_the_standard_texts():
    tokenizer = gpt2()
    fit_tokenizer(tokenizer, resolve_template("chatml", tokenizer, kwargs={}))
    assert tokenizer.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    body = "".join(header.format(m["role"]) + m["content"] + "<|eot_id|>" for m in DIALOGUE)
    for name, bos in (("tokenizers/pythia", "<|begin_of_text|>"), ("models/stories260K", "<s>")):
        tokenizer = load(name)
        fit_tokenizer(tokenizer, resolve_template("llama3", tokenizer, kwargs={}))
        text = tokenizer.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True)
        assert text == bos + body + header.format("assistant")
        assert tokenizer.bos_token == bos


@pytest.mark.parametrize("name", list(BUILT_IN))
@pytest.mark.parametrize("trimming", [False, True])
def test_built_in_templates_do_not_depend_on_how_jinja_trims(name, trimming):
    render = Environment(trim_blocks=trimming, lstrip_blocks=trimming).from_string(BUILT_IN[name]).render
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = gpt2()
    expected = tokenizer.apply_chat_template(DIALOGUE, chat_template=BUILT_IN[name], tokenize=False, **tokens)
    assert render(messages=DIALOGUE, **tokens) == expected


# Which template, which end of turn


@pytest.mark.parametrize(
    ("tokenizer", "setting", "name", "end_of_turn", "opening", "added", "pad"),
    [
        ("tokenizers/phi-3-mini", "auto", "tokenizer", "<|end|>", "", [], "<|endoftext|>"),
        ("tokenizers/phi-3-mini", "plain", "plain", "<|endoftext|>", " ", [], "<|endoftext|>"),
        ("tokenizers/gpt2", "auto", "plain", "<|endoftext|>", " ", [], "<|endoftext|>"),
        ("tokenizers/gpt2", "chatml", "chatml", "<|im_end|>", "", ["<|im_start|>", "<|im_end|>"], "<|endoftext|>"),
        ("tokenizers/gpt2", "none", "none", "<|endoftext|>", "", [], "<|endoftext|>"),
        ("tokenizers/pythia", "auto", "plain", "<|endoftext|>", " ", [], "<|padding|>"),
        ("tokenizers/pythia", "none", "none", "<|endoftext|>", "", [], "<|padding|>"),
        ("models/stories260K", "auto", "plain", "</s>", " ", [], "<unk>"),
        ("models/stories260K", "none", "none", "</s>", "", [], "<unk>"),
    ],
)
def test_template_and_tokens_of_the_real_tokenizers(tokenizer, setting, name, end_of_turn, opening, added, pad):
    tokenizer = load(tokenizer)
    size = len(tokenizer)
    template = resolve_template(setting, tokenizer, kwargs={})
    assert (template.name, template.end_of_turn, template.opening) == (name, end_of_turn, opening)
    assert fit_tokenizer(tokenizer, template) == added
    assert len(tokenizer) == size + len(added)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (end_of_turn, pad)
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(end_of_turn)
    assert fit_tokenizer(tokenizer, template) == []
    assert tokenizer.chat_template == template.source


def test_templates_of_a_file(tmp_path):
    tokenizer = load("models/stories260K")
    mistral = from_file(tmp_path, tokenizer, MISTRAL)
    assert (mistral.end_of_turn, mistral.opening, mistral.control_tokens) == ("</s>", " ", ("<s>", "</s>"))
    gemma = from_file(tmp_path, tokenizer, GEMMA)
    assert gemma.end_of_turn == "<end_of_turn>"
    assert gemma.control_tokens == ("<s>", "<start_of_turn>", "<end_of_turn>")
    assert fit_tokenizer(tokenizer, gemma) == ["<start_of_turn>", "<end_of_turn>"]
    qwen = from_file(tmp_path, gpt2(), QWEN3)
    assert (qwen.end_of_turn, qwen.opening) == ("<|im_end|>", "<think>\n\n</think>\n\n")
    unthinking = from_file(tmp_path, gpt2(), QWEN3, kwargs={"enable_thinking": False})
    assert unthinking.opening == ""


def test_a_given_eos_token_is_the_end_and_is_added_when_missing():
    tokenizer = load("tokenizers/pythia")
    template = resolve_template("plain", tokenizer, eos_token="<|stop|>", kwargs={})
    assert template.end_of_turn == "<|stop|>"
    assert fit_tokenizer(tokenizer, template) == ["<|stop|>"]
    dialogue = [Message("user", "Hi"), Message("assistant", "Hello")]
    assert render(tokenizer, template, dialogue).endswith("Hello<|stop|>")
    phi = load("tokenizers/phi-3-mini")
    assert resolve_template("auto", phi, eos_token="<|endoftext|>", kwargs={}).end_of_turn == "<|endoftext|>"


def test_a_tokenizer_without_any_eos_gets_one():
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "b": 1}, [])))
    assert fit_tokenizer(tokenizer, resolve_template("plain", tokenizer, kwargs={})) == ["<|endoftext|>"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (2, "<|endoftext|>")


def test_eos_token_in_earlier_turns_stays_what_the_template_meant(tmp_path):
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'assistant' %}<|eot|>{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = gpt2()
    before = tokenizer.apply_chat_template(DIALOGUE, chat_template=source, tokenize=False)
    assert "Hello<|eot|><|endoftext|>" in before
    template = fitted(tmp_path, tokenizer, source)
    assert tokenizer.eos_token == "<|eot|>"
    assert tokenizer.apply_chat_template(DIALOGUE, tokenize=False) == before
    assert render(tokenizer, template, [Message(**m) for m in DIALOGUE]) == before


def test_bos_is_written_into_the_template_where_training_sees_one(tmp_path):
    def text(setting, add_bos, by_itself=False):
        tokenizer = load("models/stories260K")
        if by_itself:
            tokenizer.add_bos_token = True
            assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        fit_tokenizer(tokenizer, resolve_template(setting, tokenizer, add_bos=add_bos, kwargs={}))
        return tokenizer.apply_chat_template(DIALOGUE, tokenize=False)

    gemma = tmp_path / "gemma.jinja"
    gemma.write_text(GEMMA.replace("{{ raise_exception('System role not supported') }}", ""))
    assert text("plain", "auto").startswith("Be brief.")
    assert text("plain", True).startswith("<s>Be brief.")
    assert text("plain", "auto", by_itself=True).startswith("<s>Be brief.")
    assert text("plain", False, by_itself=True).startswith("Be brief.")
    assert text(str(gemma), "auto").startswith("<s><start_of_turn>")
    assert text(str(gemma), True, by_itself=True).startswith("<s><start_of_turn>")
    assert text(str(gemma), False).startswith("<start_of_turn>")
    assert text("llama3", "auto").startswith("<s><|start_header_id|>")
    assert text("llama3", False).startswith("<|start_header_id|>")


# Saving


@pytest.mark.parametrize(
    "name", ["tokenizers/phi-3-mini", "tokenizers/gpt2", "tokenizers/pythia", "models/stories260K"]
)
@pytest.mark.parametrize("setting", ["auto", "plain", "chatml", "llama3", "none"])
def test_a_fitted_tokenizer_survives_saving(tmp_path, name, setting):
    tokenizer = load(name)
    template = resolve_template(setting, tokenizer, kwargs={})
    fit_tokenizer(tokenizer, template)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    specials = "".join(f" a{token}\n b" for token in [*template.control_tokens, *tokenizer.all_special_tokens])
    for text in (specials, "Zoë 😀\n\n  <b>x</b> </s>"):
        for options in ({}, {"add_special_tokens": False}):
            assert reloaded(text, **options).input_ids == tokenizer(text, **options).input_ids
    for attribute in ("chat_template", "eos_token_id", "pad_token_id", "bos_token_id", "all_special_ids"):
        assert getattr(reloaded, attribute) == getattr(tokenizer, attribute)
    assert len(reloaded) == len(tokenizer)
    end = tokenizer.convert_tokens_to_ids(template.end_of_turn)
    assert reloaded.decode([end], skip_special_tokens=True) == ""
    if setting != "none":
        again = resolve_template("auto", reloaded, kwargs={})
        assert (again.end_of_turn, again.opening) == (template.end_of_turn, template.opening)
        assert fit_tokenizer(reloaded, again) == []


# What goes wrong


def test_a_refused_dialogue_is_dropped_and_says_why(tmp_path):
    user, assistant = Message("user", "Hi"), Message("assistant", "Hello")
    tokenizer = load("models/stories260K")
    mistral = fitted(tmp_path, tokenizer, MISTRAL)
    with pytest.raises(Drop, match=r"malformed: .*roles must alternate") as dropped:
        render(tokenizer, mistral, [user, user])
    assert dropped.value.reason == "malformed"
    gemma = fitted(tmp_path, tokenizer, GEMMA)
    with pytest.raises(Drop, match="supports no system turn: System role not supported"):
        render(tokenizer, gemma, [Message("system", "s"), user, assistant])
    with pytest.raises(Drop, match="malformed"):
        render(tokenizer, gemma, [])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}\n{{ m.content", "line 2"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "answer"),
        ("{{ messages[0].content.__class__.__mro__ }}{{ messages[1].content }}", "cannot render"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "cannot render"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_broken_template_is_explained(tmp_path, source, message):
    with pytest.raises(ModelError, match=message) as error:
        from_file(tmp_path, gpt2(), source)
    assert error.value.hint


def test_an_absent_template_file_is_explained():
    with pytest.raises(ModelError, match=r"chatlm cannot be read: No such file") as error:
        resolve_template("chatlm", gpt2(), kwargs={})
    assert "chatml" in error.value.hint


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow does not say") as error:
        require_offsets(Slow())
    assert "tokenizer.json" in error.value.hint


# ---- the day


DATED = "  {% if true %}{{ strftime_now('%d %b %Y, %A%% %-d %H:%M') }}|{% endif %}" + BUILT_IN["plain"]


@pytest.mark.parametrize("day", ["2024-02-29", "2026-11-05"])
def test_a_template_is_told_the_day_of_the_recipe(tmp_path, day):
    path = tmp_path / "dated.jinja"
    path.write_text(DATED)
    tokenizer = gpt2()
    template = resolve_template(str(path), tokenizer, kwargs={}, day=day)
    told = date.fromisoformat(day).strftime("%d %b %Y, %A%% %-d %H:%M")
    assert render(tokenizer, template, [Message("user", "Hi")]) == f"{told}|User: Hi"
    assert template.day == day
    fit_tokenizer(tokenizer, template)
    assert tokenizer.chat_template == DATED  # whoever uses the model is told the true one


def test_today_where_nothing_else_is_said_and_no_day_where_none_is_asked(tmp_path):
    path = tmp_path / "dated.jinja"
    path.write_text("{% if messages[0].role == 'system' and strftime_now('%Y') | int > 2000 %}now {% endif %}" + DATED)
    before = date.today()
    found = resolve_template(str(path), gpt2(), kwargs={}).day
    assert before.isoformat() <= found <= date.today().isoformat()
    for name in ("plain", "chatml", "none"):
        assert resolve_template(name, gpt2(), kwargs={}, day="2024-02-29").day is None


def test_an_undated_template_stands_where_it_stood(tmp_path):
    path = tmp_path / "broken.jinja"
    path.write_text("a\n{% for %}")
    with pytest.raises(ModelError, match=r"broken.jinja, line 2: "):
        resolve_template(str(path), gpt2(), kwargs={})
