"""`orpo generate`: answers by stock generation, as whoever uses the model will get them, one by one or in a chat."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TextStreamer

from orpo_cli.data.formats import Message
from orpo_cli.data.templates import render
from orpo_cli.errors import InputError, is_out_of_memory
from orpo_cli.malloc import keep_freed_memory
from orpo_cli.model.build import TextSide, build_for_scoring, context_of, context_tokens, load_text_side, stop_ids
from orpo_cli.model.logprobs import inference, length_dependent_beyond, stock_attention
from orpo_cli.recipe import Recipe
from orpo_cli.subject import find_subject, require_there
from orpo_cli.terminal import warn

NEW_DIALOGUE = "/new"
"""What begins a new dialogue in a chat."""
# Answers made at once, and the tokens of prompts and answers that a cache may hold meanwhile: 2 GiB for a model of 8B.
TOGETHER, CACHED_TOKENS = 16, 16_384


def prompt_ids(text: TextSide, prompt: str, system: str | None = None) -> list[int]:
    """Token ids of a prompt as in training: one user turn under the template, or as it is under `none`.

    Raises InputError for a prompt that is no Unicode text.
    """
    require_unicode(prompt)
    if text.template.source is None:
        ids = text.tokenizer(prompt, add_special_tokens=False).input_ids
        return [text.tokenizer.bos_token_id, *ids] if text.starts_with_bos else ids
    return dialogue_ids(text, [*([Message("system", system)] if system else []), Message("user", prompt)])


def dialogue_ids(text: TextSide, dialogue: Sequence[Message]) -> list[int]:
    """Token ids of a dialogue whose next turn is the assistant's, as in training; for a template that has turns.

    Raises InputError where a turn is no Unicode text.
    """
    for message in dialogue:
        require_unicode(message.content)
    rendered = render(text.tokenizer, text.template, dialogue, add_generation_prompt=True)
    return text.tokenizer(rendered, add_special_tokens=False).input_ids


def require_unicode(text: str) -> None:
    """Raise InputError for a text with lone surrogates, which stand for bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"the prompt {text!r:.60} is not UTF-8", "convert it, say with iconv") from None


def check_sample_prompts(recipe: Recipe, text: TextSide) -> None:
    """Raise InputError where one of `train.sample_prompts` leaves the model's context no room for an answer."""
    context = context_tokens(recipe.model)
    for prompt in recipe.train.sample_prompts:
        try:
            room_after(prompt_ids(text, prompt, recipe.data.system), context)
        except InputError as error:
            raise InputError(f"train.sample_prompts, {prompt!r:.60}: {error.message}", error.hint) from None


def room_after(prompt: Sequence[int], context: int | None) -> int:
    """How many tokens a context holds after a prompt's. Raises InputError where it holds none."""
    room = sys.maxsize if context is None else context - len(prompt)
    if room < 1:
        raise InputError(f"the prompt has {len(prompt):,} tokens, and the model's context is {context:,}", "shorten it")
    return room


@dataclass(frozen=True)
class Sampling:
    """How long an answer may be, and how it is drawn: temperature 0 takes the likeliest token each time."""

    max_new_tokens: int = 128
    temperature: float = 0.0


def answer_to(
    model: PreTrainedModel,
    text: TextSide,
    prompt: Sequence[int],
    sampling: Sampling,
    show: Callable[[str], None] | None = None,
) -> tuple[str, bool]:
    """The model's answer to the token ids of a prompt, and whether it ended its turn by itself.

    It ends where the model's context does. `show` is given its text piece by piece while it is made. Random numbers
    come from torch's random state. Raises InputError where the prompt fills the context.
    """
    room = room_after(prompt, context_of(model.config))
    return _generated(model, text, [prompt], min(sampling.max_new_tokens, room), sampling, show)[0]


def answers_to(
    model: PreTrainedModel, text: TextSide, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[tuple[str, bool]]:
    """The answers to prompts as `answer_to` gives them one by one, but for rounding: some of like length at a time.

    Raises InputError where a prompt fills the context.
    """
    context = context_of(model.config)
    longest = [min(sampling.max_new_tokens, room_after(prompt, context)) for prompt in prompts]
    together = 1 if length_dependent_beyond(model.config) else TOGETHER
    found: dict[int, tuple[str, bool]] = {}
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while waiting:
        first = waiting[-1]  # the longest, so that memory runs out at once or never
        fit = max(1, min(together, CACHED_TOKENS // (len(prompts[first]) + longest[first])))
        batch = [i for i in waiting[-fit:] if longest[i] == longest[first]]
        try:
            said = _generated(model, text, [prompts[i] for i in batch], longest[first], sampling)
        except (MemoryError, RuntimeError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            together = len(batch) // 2
            torch.cuda.empty_cache()  # does nothing where there is no CUDA
            continue
        found.update(zip(batch, said, strict=True))
        waiting = [i for i in waiting if i not in found]
    return [found[i] for i in range(len(prompts))]


def _generated(
    model: PreTrainedModel,
    text: TextSide,
    prompts: Sequence[Sequence[int]],
    longest: int,
    sampling: Sampling,
    show: Callable[[str], None] | None = None,
) -> list[tuple[str, bool]]:
    """Stock generation of answers of `longest` tokens at most, the prompts padded on their left."""
    stops, width = stop_ids(model, text), max(map(len, prompts))
    padding = text.tokenizer.pad_token_id
    ids = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:  # of the whole vocabulary, whatever the base's generation config would cut off
        settings = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    with inference(model), stock_attention(model), torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=longest,
            eos_token_id=stops,
            pad_token_id=padding,
            use_cache=True,
            streamer=_Pieces(text.tokenizer, show) if show else None,
            **settings,
        )
    return [_said(text, row, set(stops)) for row in out[:, width:].tolist()]


def _said(text: TextSide, ids: Sequence[int], stops: Container[int]) -> tuple[str, bool]:
    """The text of generated token ids up to where the turn ended, and whether it did."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    kept = ids if end is None else ids[: end + 1]
    return text.tokenizer.decode(kept, skip_special_tokens=True).strip(), end is not None


class _Pieces(TextStreamer):
    """Hands text on as soon as no later token can change it, without the blanks before the first word."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        if text:
            self.begun = True
            self.show(text)


# ---- the verb ----


@dataclass(frozen=True)
class Speaker:
    """A model that answers as its recipe renders prompts."""

    model: PreTrainedModel
    text: TextSide
    system: str | None
    """The system turn of the training data, if the recipe has one."""
    sampling: Sampling

    def answer(self, prompt: str, show: Callable[[str], None] | None = None) -> tuple[str, bool]:
        """The answer to a prompt that stands by itself, and whether it is whole."""
        return self.answer_ids(prompt_ids(self.text, prompt, self.system), show)

    def chat(self, said: Iterable[str], show: Callable[[str], None]) -> Iterator[str]:
        """Answer each line in the dialogue of all lines before it; `/new` begins another one.

        Under the template `none` there are no turns, so that each line stands by itself.
        """
        start = [Message("system", self.system)] if self.system else []
        dialogue = list(start)
        for line in said:
            if line == NEW_DIALOGUE:
                dialogue = list(start)
                continue
            if self.text.template.source is None:
                yield self.answer(line, show)[0]
                continue
            asked = [*dialogue, Message("user", line)]
            try:
                answer, _ = self.answer_ids(dialogue_ids(self.text, asked), show)
            except InputError as error:
                warn(f"{error.message}: {NEW_DIALOGUE} begins a new dialogue")
                continue
            dialogue = [*asked, Message("assistant", answer)]
            yield answer

    def answer_ids(self, ids: Sequence[int], show: Callable[[str], None] | None = None) -> tuple[str, bool]:
        """The answer to the token ids of a prompt, as far as the context has room for it, and whether it is whole."""
        return answer_to(self.model, self.text, ids, self.sampling, show)


def load_speaker(target: str, *, base: str | None, sampling: Sampling, seed: int) -> Speaker:
    """What `target` names, a run, an adapter or a model, ready to answer; `base` is another base for an adapter.

    Raises InputError kinds where something is missing.
    """
    subject = find_subject(target, None, None, scores=False)
    if base is not None and subject.adapter is None:
        raise InputError(f"{target} has no adapter to put into {base}", "leave --base out")
    if base:
        require_there(base, "--base")
    changes = {"name_or_path": base, "revision": "main"} if base else {}
    section = subject.recipe.model.model_copy(update=changes)
    recipe, device = subject.recipe.model_copy(update={"model": section}), PartialState().device
    if device.type == "cpu":
        keep_freed_memory()
    text = load_text_side(recipe, subject.tokenizer)
    built = build_for_scoring(section, text, device, adapter=subject.adapter)
    torch.manual_seed(seed)
    return Speaker(built.base, text, recipe.data.system, sampling)


def written_lines(stream: TextIO) -> Iterator[str]:
    """The lines of a stream but for blank ones. Raises InputError where it is not UTF-8."""
    try:
        for line in stream:
            if line.strip():
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8: {error}", "convert it, say with iconv") from None


def typed_lines() -> Iterator[str]:
    """What is typed on a terminal, line by line, until its end (Ctrl-D); blank lines are passed over."""
    with suppress(ImportError):
        import readline  # noqa: F401 - editing and history for input()
    prompt = "> "
    while True:
        if not sys.stdout.isatty():  # input() would write it there
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = input(prompt if sys.stdout.isatty() else "")
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line
