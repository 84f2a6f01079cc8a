"""Chat templates: which one a recipe means, what ends a turn in it, and a tokenizer that knows its tokens.

A template is jinja text that transformers renders in its sandbox; what we need to know about one is found by
rendering small probe dialogues, never by reading its source.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from tokenizers import AddedToken

from orpo_cli.data.formats import Drop, Message
from orpo_cli.errors import ModelError

PLAIN = """\
{%- for message in messages -%}
    {%- if not loop.first %}{{ "\\n\\n" }}{% endif -%}
    {%- if message["role"] == "system" -%}
        {{- message["content"] -}}
    {%- else -%}
        {{- message["role"] | capitalize + ": " + message["content"] -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "\\n\\nAssistant:" -}}
{%- elif messages[-1]["role"] == "assistant" -%}
    {{- eos_token -}}
{%- endif -%}
"""

CHATML = """\
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""

LLAMA3_BOS = "<|begin_of_text|>"
LLAMA3 = """\
{{- bos_token | default("<|begin_of_text|>") -}}
{%- for message in messages -%}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" -}}
    {{- message["content"] + "<|eot_id|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" -}}
{%- endif -%}
"""

BUILT_IN = {"plain": PLAIN, "chatml": CHATML, "llama3": LLAMA3}

# What a tokenizer that names no EOS may call it. The last resort is to add the first (</s> is HTML, too).
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "<|padding|>", "[PAD]", "<|vision_pad|>")

# How control tokens look that the tokenizer does not have yet: <|im_start|>, <|turn>, <start_of_turn>, </s>.
CONTROL_LOOK = r"<[|｜][^<>|｜\s]+[|｜]?>|<[^<>|｜\s]+[|｜]>|<(?:start|end)_of_\w+>|</?s>"

# Stands for a text while a template is probed: survives trimming, and no template and no data can hold it.
SENTINEL = f"Zq{secrets.token_hex(8)}qZ"
QUESTION = "What is it?"
DIALOGUE = ["user", "assistant", "user"]
"""The turns of a made-up dialogue that waits for an answer, its second one."""


@dataclass(frozen=True)
class ChatTemplate:
    """How a dialogue becomes text, and what is known about it.

    name: `tokenizer` (its own), `plain`, `chatml`, `llama3`, `none` or the path of a file.
    source: jinja text; None for `none`, where strings are taken as they are.
    kwargs: the recipe's `chat_template_kwargs`, handed to every rendering.
    end_of_turn: the token text that ends a sequence; stock generation stops there.
    control_tokens: the control tokens that the template writes, in order of appearance; `end_of_turn` is one.
    opening: what the template writes between the generation prompt and the answer: "" for most, " " for
        plain, an empty think block for Qwen3.
    day: the day (2026-11-21) that it is in every rendering; None where the template does not ask.
    """

    name: str
    source: str | None
    kwargs: dict[str, Any]
    end_of_turn: str
    control_tokens: tuple[str, ...]
    opening: str
    day: str | None = None

    @property
    def rendered_source(self) -> str | None:
        """The jinja text with its day in place of today."""
        return self.source if self.source is None or self.day is None else _stopped_clock(self.day) + self.source


def resolve_template(
    setting: str,
    tokenizer: Any,
    *,
    eos_token: str = "auto",
    add_bos: bool | str = "auto",
    kwargs: dict[str, Any],
    day: str = "auto",
) -> ChatTemplate:
    """Find the template that the recipe means for this tokenizer.

    setting: auto (the tokenizer's own, else plain), plain, chatml, llama3, none, or the path of a jinja file.
    eos_token: auto = the first control token that the template writes after an answer, else the tokenizer's
        EOS, else a token of its vocabulary that is named like one, else a new `<|endoftext|>`.
    add_bos: whether the template's text begins with BOS; auto = as it does, else as the tokenizer does by itself.
    kwargs: `chat_template_kwargs`.
    day: `chat_template_date`; auto = today.

    The tokenizer is not changed; `fit_tokenizer` does that. Raises ModelError for a template that is missing,
    broken or does not write the answer.
    """
    require_offsets(tokenizer)
    eos = _usual_eos(tokenizer) if eos_token == "auto" else eos_token
    if setting == "none":
        return ChatTemplate("none", None, dict(kwargs), eos, (eos,), "")

    name, source = _find_source(setting, tokenizer)
    day = date.today().isoformat() if day == "auto" else day
    probe = _Probe(tokenizer, name, kwargs, day)
    answered = probe.render(source, ["user", "assistant"], eos_token=eos)
    if SENTINEL not in answered:
        raise ModelError(
            f"chat template {name}: it does not write the assistant's answer",
            "check the template, or set model.chat_template: plain",
        )
    control = control_pattern([eos, *special_tokens(tokenizer)], CONTROL_LOOK)
    ending = control.search(answered.rpartition(SENTINEL)[2])
    end_of_turn = ending.group() if ending and eos_token == "auto" else eos

    source = probe.as_stock_renders(source, eos, end_of_turn, add_bos)
    prompt = probe.render(source, DIALOGUE, add_generation_prompt=True, eos_token=end_of_turn)
    roles = [*DIALOGUE, "assistant"]
    full = probe.render(source, roles, eos_token=end_of_turn)
    before = full.rpartition(SENTINEL)[0]
    with_system = probe.render_system(source)
    written = control.findall(with_system + prompt + before)
    undated = dataclasses.replace(probe, day=None)
    asks = (with_system, full) != (undated.render_system(source), undated.render(source, roles, eos_token=end_of_turn))
    return ChatTemplate(
        name=name,
        source=source,
        kwargs=dict(kwargs),
        end_of_turn=end_of_turn,
        control_tokens=tuple(dict.fromkeys([*written, end_of_turn])),
        opening=before[len(prompt) :] if before.startswith(prompt) else "",
        day=day if asks else None,
    )


def _usual_eos(tokenizer: Any) -> str:
    """The tokenizer's EOS, else a token of its vocabulary that is named like one, else a new one."""
    named = (name for name in EOS_NAMES if tokenizer.backend_tokenizer.token_to_id(name) is not None)
    return tokenizer.eos_token or next(named, EOS_NAMES[0])


def fit_tokenizer(tokenizer: Any, template: ChatTemplate) -> list[str]:
    """Teach `tokenizer` the template, in place: control tokens, chat_template, EOS = end of turn, a pad.

    Returns the tokens that were added to the vocabulary. A pad token never grows it: an existing pad-like one,
    else unk, else EOS (targets are found by position, so a pad that equals EOS hides no EOS from the loss).
    """
    backend = tokenizer.backend_tokenizer
    missing = [token for token in template.control_tokens if token not in tokenizer.added_tokens_encoder]
    added = [token for token in missing if backend.token_to_id(token) is None]
    if missing:
        specials = [AddedToken(token, special=True, normalized=False) for token in missing]
        tokenizer.add_special_tokens({"extra_special_tokens": specials}, replace_extra_special_tokens=False)
    if template.source is not None:
        tokenizer.chat_template = template.source
    tokenizer.eos_token = template.end_of_turn
    if tokenizer.bos_token is None and LLAMA3_BOS in template.control_tokens:
        tokenizer.bos_token = LLAMA3_BOS
    if tokenizer.pad_token is None:
        pad_like = (name for name in PAD_NAMES if name in tokenizer.added_tokens_encoder)
        tokenizer.pad_token = next(pad_like, tokenizer.unk_token or tokenizer.eos_token)
    return added


def render(
    tokenizer: Any,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The dialogue as text, by stock `apply_chat_template` with the template's own kwargs.

    Raises Drop("malformed") where the template refuses the dialogue.
    """
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            conversation,
            chat_template=template.rendered_source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template.kwargs,
        )
    except Exception as error:  # whatever a stranger's template does wrong
        detail = f"the chat template refuses the dialogue: {error}"
        if messages and messages[0].role == "system":
            try:
                render(tokenizer, template, messages[1:], add_generation_prompt=add_generation_prompt)
                detail = f"the chat template supports no system turn: {error}"
            except Drop:
                pass
        raise Drop("malformed", detail) from None


def special_tokens(tokenizer: Any) -> list[str]:
    """The tokens that this tokenizer treats as control: added ones marked special; BOS, EOS, pad and such."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*added, *tokenizer.all_special_tokens]))


def control_pattern(tokens: Sequence[str], *patterns: str) -> re.Pattern[str]:
    """A regex for any of `tokens`, the longest first, or any of `patterns`; with neither, it matches nothing."""
    literal = [re.escape(token) for token in sorted(tokens, key=len, reverse=True)]
    return re.compile("|".join([*literal, *patterns]) or "(?!)")


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer puts its BOS before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def require_offsets(tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer that cannot say which characters a token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} does not say which characters its tokens cover",
            "orpo needs a fast tokenizer: save the model with a tokenizer.json",
        )


def _find_source(setting: str, tokenizer: Any) -> tuple[str, str]:
    """The setting's (name, jinja text)."""
    if setting == "auto" and tokenizer.chat_template:
        try:
            return "tokenizer", tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                f"the tokenizer holds several chat templates and no default: {error}",
                "save the one you want to a file and set model.chat_template to its path",
            ) from None
    if setting == "auto":
        setting = "plain"
    if setting in BUILT_IN:
        return setting, BUILT_IN[setting]
    return setting, template_file(setting)


def template_file(path: str) -> str:
    """The jinja text of a file. Raises ModelError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelError(
            f"model.chat_template: {path} cannot be read: {why}",
            f"give auto, {', '.join(BUILT_IN)}, none or the path of a jinja file",
        ) from None


# What strftime knows (POSIX), and glibc's forms without a leading zero.
_DIRECTIVES = [*"aAbBcCdDeFgGhHIjmMnprRStTuUVwWxXyY", "-d", "-m", "-y", "-H", "-I", "-M", "-S", "-j"]


@cache
def _stopped_clock(day: str | None) -> str:
    """Jinja text for which it always is midnight of a day (2026-11-21), or no time that could be told.

    transformers hands a template no function of ours, so that `strftime_now` becomes a macro of the template's own. It
    takes a line, of which jinja drops the end: what begins the template still begins a line.
    """
    said = "''"
    if day is not None:
        then = date.fromisoformat(day)
        texts = {f"%{directive}": then.strftime(f"%{directive}") for directive in _DIRECTIVES} | {"%%": "%"}
        said = "format" + "".join(f" | replace({json.dumps(k)}, {json.dumps(text)})" for k, text in texts.items())
    return f"{{%- macro strftime_now(format) -%}}{{{{ {said} }}}}{{%- endmacro %}}\n"


@dataclass(frozen=True)
class _Probe:
    """Renders made-up dialogues with templates that no tokenizer has been given yet."""

    tokenizer: Any
    name: str
    kwargs: dict[str, Any]
    day: str | None

    def render(self, source: str, roles: list[str], **kwargs: Any) -> str:
        """A dialogue in which every answer is the sentinel."""
        conversation = [{"role": role, "content": SENTINEL if role == "assistant" else QUESTION} for role in roles]
        try:
            return self.tokenizer.apply_chat_template(
                conversation,
                chat_template=_stopped_clock(self.day) + source,
                tokenize=False,
                **{**self.kwargs, **kwargs},
            )
        except TemplateSyntaxError as error:
            raise ModelError(
                f"chat template {self.name}, line {error.lineno - 1}: {error.message}",
                "correct the jinja text, or set model.chat_template: plain",
            ) from None
        except Exception as error:  # whatever a stranger's template does wrong
            raise ModelError(
                f"chat template {self.name} cannot render {', '.join(roles)}: {error}",
                "check the template and model.chat_template_kwargs, or set model.chat_template: plain",
            ) from None

    def as_stock_renders(self, source: str, eos: str, end_of_turn: str, add_bos: bool | str) -> str:
        """The template with what training sees written into it: stock generation reads the saved template alone."""
        tokenizer = self.tokenizer
        # The end of turn becomes the tokenizer's EOS; where eos_token stands in earlier turns, the template keeps the
        # one that it meant.
        meant = self.render(source, DIALOGUE, add_generation_prompt=True, eos_token=eos)
        if self.render(source, DIALOGUE, add_generation_prompt=True, eos_token=end_of_turn) != meant:
            source = f"{{%- set eos_token = {json.dumps(eos)} %}}{source}"
        # Stock apply_chat_template adds no BOS by itself.
        has_bos = meant.startswith(tokenizer.bos_token or LLAMA3_BOS)
        if has_bos and add_bos is False:
            source = f"{{%- set bos_token = '' %}}{source}"
        elif not has_bos and (adds_bos(tokenizer) if add_bos == "auto" else add_bos):
            source = f"{{{{ bos_token }}}}{source}"
        return source

    def render_system(self, source: str) -> str:
        """A dialogue with a system turn, or "" where the template takes none."""
        try:
            return self.render(source, ["system", "user"], add_generation_prompt=True)
        except ModelError:
            return ""
