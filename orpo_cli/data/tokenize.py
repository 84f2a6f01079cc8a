"""`Pair` -> token ids: rendering, BOS and end of turn, which tokens are the response's, the length policy.

The whole text (prompt + response) is tokenised at once; a token belongs to the response if its last character
does.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from orpo_cli.data.formats import Drop, Message, Pair, already_templated
from orpo_cli.data.guard import Guard, encoder_of
from orpo_cli.data.templates import (
    QUESTION,
    SENTINEL,
    ChatTemplate,
    adds_bos,
    render,
    require_offsets,
    special_tokens,
)
from orpo_cli.errors import DataError, ModelError


@dataclass(frozen=True)
class TokenizedPair:
    """One pair as token ids; each side is its prompt and response, BOS and end of turn included.

    index: position of the row in its data, 0-based over all sources concatenated.
    chosen_ids, rejected_ids: int32 (Lc,) and (Lr,).
    chosen_start, rejected_start: first token of the response in them, 1 <= start < L.
    assistant_mask: bool (Lc,), the tokens of every assistant turn in `chosen_ids`; None unless asked for.
    truncated: whether the length policy took something off its prompt or its responses.
    """

    index: int
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_start: int
    rejected_start: int
    assistant_mask: np.ndarray | None
    truncated: bool = False

    @property
    def response_tokens(self) -> tuple[int, int]:
        """Tokens of the chosen and of the rejected response, the end of turn counted."""
        return len(self.chosen_ids) - self.chosen_start, len(self.rejected_ids) - self.rejected_start


class PairTokenizer:
    """Tokenises pairs by one template and one length policy.

    `tokenizer` has been fitted to `template` (`fit_tokenizer`); it is not changed, and later changes to its
    vocabulary are not seen. The other arguments are the recipe's keys of the same names.

    Raises ModelError for a tokenizer without offsets or, with `add_bos`, without a BOS.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate,
        *,
        max_length: int,
        max_prompt_length: int | None = None,
        overlong: str = "drop",
        min_response_tokens: int = 1,
        add_bos: bool | str = "auto",
        nll_tokens: str = "response",
    ) -> None:
        require_offsets(tokenizer)
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.overlong = overlong
        self.min_response_tokens = min_response_tokens
        self.masks_assistant = nll_tokens == "assistant"

        self._bos_id: int | None = tokenizer.bos_token_id
        self._end_id = tokenizer.convert_tokens_to_ids(template.end_of_turn)
        self._add_bos = adds_bos(tokenizer) if add_bos == "auto" else bool(add_bos)
        self._strip_bos = add_bos is False
        if self._add_bos and self._bos_id is None:
            raise ModelError(
                "data.add_bos is true, but the tokenizer has no BOS token",
                "leave data.add_bos at auto",
            )
        self._backend = encoder_of(tokenizer)
        self._guard: Guard | None = None
        if template.source is not None:
            self._guard = Guard(tokenizer, [*special_tokens(tokenizer), *template.control_tokens])
            question = Message("user", QUESTION)
            answered = render(tokenizer, template, [question, Message("assistant", SENTINEL)])
            # What the template writes after the answer, and as much of it as belongs to the sequence.
            self._suffix = answered.rpartition(SENTINEL)[2]
            self._closing = _through(self._suffix, template.end_of_turn)
            if self.masks_assistant:
                self._require_turns(question)

    def __call__(self, pair: Pair, index: int) -> TokenizedPair:
        """Tokenise row `index`.

        Raises Drop for a row that cannot be used; DataError for one that is too long under `overlong: error`, or
        that `none` cannot take.
        """
        [result] = self.batch([(index, pair)])
        if isinstance(result, Drop):
            raise result
        return result

    def batch(self, rows: Sequence[tuple[int, Pair]]) -> list[TokenizedPair | Drop]:
        """Tokenise many (index, pair) rows in one call of the tokenizer, which is what makes it fast.

        A row that cannot be used gives its Drop in its place; errors are raised as by a single call.
        """
        rows = [(index, _within(self.max_length, pair)) for index, pair in rows]
        rendered: list[tuple[_Text, _Text] | Drop] = []
        for index, pair in rows:
            try:
                rendered.append(self._texts(pair, self._dialogue(pair, index)))
            except Drop as drop:
                rendered.append(drop)
        usable = [texts for texts in rendered if not isinstance(texts, Drop)]
        encoded = iter(self._encode([text for texts in usable for text in texts]))

        results: list[TokenizedPair | Drop] = []
        for (index, pair), texts in zip(rows, rendered, strict=True):
            if isinstance(texts, Drop):
                results.append(texts)
                continue
            chosen, rejected = next(encoded), next(encoded)
            try:
                results.append(self._finish(pair, index, chosen, rejected))
            except Drop as drop:
                results.append(drop)
        return results

    def under(self, overlong: str, *, limited: bool = True) -> PairTokenizer:
        """The same with another length policy, or with `limited=False` for pairs of any length."""
        other = copy.copy(self)
        other.overlong = overlong
        if not limited:
            other.max_length, other.max_prompt_length = sys.maxsize, None
        return other

    @property
    def fingerprint(self) -> str:
        """Changes with whatever may change a pair's tokens, or whether it is dropped."""
        limits = (self.max_length, self.max_prompt_length, self.overlong, self.min_response_tokens)
        marks = (self._add_bos, self._strip_bos, self._bos_id, self._end_id, self.masks_assistant)
        said = json.dumps([dataclasses.asdict(self.template), limits, marks], sort_keys=True, default=str)
        return hashlib.sha256((said + self._backend.to_str()).encode()).hexdigest()

    # Text

    def _dialogue(self, pair: Pair, index: int) -> tuple[Message, ...] | str:
        """The prompt as the template takes it: messages, or under `none` a string."""
        if self.template.source is None:
            if not isinstance(pair.prompt, str) or pair.system:
                what = "has a system text" if isinstance(pair.prompt, str) else "is a list of messages"
                raise DataError(
                    f"row {index}: its prompt {what}, and model.chat_template is none",
                    "set model.chat_template: auto, plain, chatml or llama3, or give strings with their turns",
                )
            return pair.prompt
        if not isinstance(pair.prompt, str):
            return pair.prompt
        for text in (pair.prompt, pair.chosen, pair.rejected):
            if marker := already_templated(text):
                raise Drop(
                    "malformed",
                    f"already templated with {marker}: set model.chat_template: none, which takes it as it is",
                )
        system = (Message("system", pair.system),) if pair.system else ()
        return (*system, Message("user", pair.prompt))

    def _texts(self, pair: Pair, prompt: tuple[Message, ...] | str) -> tuple[_Text, _Text]:
        """The chosen and the rejected side as text, with `prompt` in place of the pair's own."""
        if isinstance(prompt, str):
            return (_Text(prompt + pair.chosen, len(prompt)), _Text(prompt + pair.rejected, len(prompt)))
        assert self._guard is not None
        answers = (pair.chosen, pair.rejected)
        if guarded := self._guard.found_in([*(message.content for message in prompt), *answers]):
            prompt = tuple(replace(message, content=self._guard.hide(message.content)) for message in prompt)
            answers = (self._guard.hide(pair.chosen), self._guard.hide(pair.rejected))
        opened = render(self.tokenizer, self.template, prompt, add_generation_prompt=True)
        chosen, rejected = (self._text(prompt, opened, answer) for answer in answers)
        if self.masks_assistant:
            chosen = replace(chosen, turns=self._earlier_turns(prompt, chosen.text))
        return (chosen.revealed(self._guard), rejected.revealed(self._guard)) if guarded else (chosen, rejected)

    def _text(self, prompt: tuple[Message, ...], opened: str, answer: str) -> _Text:
        """Render one side and find the response in it; `opened` is the rendered prompt."""

        def rendered(answer: str) -> str:
            return render(self.tokenizer, self.template, [*prompt, Message("assistant", answer)])

        text, before, suffix = rendered(answer), opened, self._suffix
        # White space before the answer is the prompt's; an empty think block is the model's to write.
        if self.template.opening.isspace() and text.startswith(opened + self.template.opening):
            before += self.template.opening
        if not (text.startswith(before) and text.endswith(suffix)):
            # The generation prompt is not how the template goes on to an answer: the response is its content.
            before, _, suffix = rendered(SENTINEL).rpartition(SENTINEL)
            if not (text.startswith(before) and text.endswith(suffix)):
                raise Drop("malformed", "the chat template changes what stands before the answer with the answer")
        end = len(text) - len(suffix)
        return _Text(text[: end + len(_through(suffix, self.template.end_of_turn))], len(before))

    def _earlier_turns(self, prompt: tuple[Message, ...], text: str) -> tuple[tuple[int, int], ...]:
        """Character spans in `text` of the assistant turns before the last: content, and its end if one is written.

        A sentinel in each turn's place shows what the template writes around them; the text is walked along that.
        """
        turns = [message.content for message in prompt if message.role == "assistant"]
        if not turns:
            return ()
        probe = [replace(m, content=SENTINEL) if m.role == "assistant" else m for m in prompt]
        probe.append(Message("assistant", SENTINEL))
        around = render(self.tokenizer, self.template, probe).split(SENTINEL)
        if len(around) != len(turns) + 2:
            raise Drop("malformed", "the chat template does not write every assistant turn once")
        around[-2] = around[-2].removesuffix(self.template.opening)
        spans = []
        position = 0
        for i, content in enumerate(turns):
            before, after = around[i], around[i + 1]
            length = _written(content, after, text, position + len(before))
            if length is None or not text.startswith(before, position):
                raise Drop("malformed", f"the chat template does not write assistant turn {i + 1} as it is")
            begin = position + len(before)
            position = begin + length
            spans.append((begin, position + (len(self._closing) if after.startswith(self._closing) else 0)))
        return tuple(spans)

    def _require_turns(self, question: Message) -> None:
        """Raise ModelError for a template in which earlier assistant turns cannot be found."""
        answer = Message("assistant", "an answer")
        dialogue = (question, answer, question)
        try:
            self._earlier_turns(dialogue, render(self.tokenizer, self.template, [*dialogue, answer]))
        except Drop as drop:
            raise ModelError(
                f"chat template {self.template.name} does not show its assistant turns ({drop.detail})",
                "set loss.nll_tokens to response or all, or another model.chat_template",
            ) from None

    # Tokens

    def _encode(self, texts: Sequence[_Text]) -> list[_Tokens]:
        """Tokenise, and put BOS and end of turn where they are missing."""
        encodings: list[Any] = [None] * len(texts)
        for guarded in (False, True):
            which = [i for i, text in enumerate(texts) if text.guarded == guarded]
            if which:
                encoder = self._guard.encoder if guarded and self._guard else self._backend
                batch = encoder.encode_batch([texts[i].text for i in which], add_special_tokens=False)
                for i, encoding in zip(which, batch, strict=True):
                    encodings[i] = encoding
        return [self._tokens(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _tokens(self, text: _Text, encoding: Any) -> _Tokens:
        ids = np.array(encoding.ids, dtype=np.int32)
        if text.guarded and self._guard:
            ids = self._guard.real_ids[ids]
        begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        start = _first_past(ends, text.start)
        mask = None
        if self.masks_assistant:
            mask = np.arange(len(ids)) >= start
            for begin, end in text.turns:
                # An end of turn may have swallowed the white space behind it.
                ends_turn = (ids == self._end_id) & (begins < end)
                mask |= (begin < ends) & ((ends <= end) | ends_turn)

        has_bos = self._has_bos(ids)
        if self._strip_bos and has_bos and start > 0:
            ids, start, mask = ids[1:], start - 1, None if mask is None else mask[1:]
        elif self._add_bos and not has_bos:
            ids, start = np.insert(ids, 0, self._bos_id), start + 1  # type: ignore[arg-type]
            mask = None if mask is None else np.append(False, mask)
        # Under `none` the response may hold its own.
        if not len(ids) or ids[-1] != self._end_id:
            ids = np.append(ids, np.int32(self._end_id))
            mask = None if mask is None else np.append(mask, True)
        return _Tokens(ids, start, mask)

    def _has_bos(self, ids: np.ndarray) -> bool:
        return bool(len(ids)) and self._bos_id is not None and ids[0] == self._bos_id

    # Length

    def _finish(self, pair: Pair, index: int, chosen: _Tokens, rejected: _Tokens) -> TokenizedPair:
        """Check the pair and bring it to length."""
        for name, answer, side in (("chosen", pair.chosen, chosen), ("rejected", pair.rejected, rejected)):
            count = side.response_tokens - (side.ids[-1] == self._end_id)
            if not answer or count < self.min_response_tokens:
                raise Drop("empty", f"{name} has {count} tokens, fewer than {self.min_response_tokens}")
            if side.start < 1:
                raise Drop("empty", "no token stands before the response: an empty prompt, and no BOS")
        return self._to_length(pair, index, chosen, rejected)

    def fit(self, pair: Pair, whole: TokenizedPair) -> TokenizedPair | Drop:
        """Bring a pair to length that was tokenised without limits (`under(..., limited=False)`), or drop it.

        Raises DataError under `overlong: error`.
        """
        chosen = _Tokens(whole.chosen_ids, whole.chosen_start, whole.assistant_mask)
        rejected = _Tokens(whole.rejected_ids, whole.rejected_start, None)
        try:
            return self._to_length(pair, whole.index, chosen, rejected)
        except Drop as drop:
            return drop

    def _to_length(self, pair: Pair, index: int, chosen: _Tokens, rejected: _Tokens) -> TokenizedPair:
        """Apply the length policy, and drop what is then the same on both sides."""
        too_long = self._too_long(max(len(chosen.ids), len(rejected.ids)), max(chosen.start, rejected.start))
        if too_long:
            chosen, rejected = self._shortened(pair, index, chosen, rejected, too_long)
        if np.array_equal(chosen.ids, rejected.ids):
            raise Drop("identical", "chosen and rejected are the same tokens")
        return TokenizedPair(
            index, chosen.ids, rejected.ids, chosen.start, rejected.start, chosen.mask, truncated=bool(too_long)
        )

    def _too_long(self, longest: int, prompt: int) -> str:
        """Which limit is exceeded by a pair whose longer side and whose prompt have so many tokens; "" if none is."""
        if longest > self.max_length:
            return f"{longest:,} tokens exceed max_length {self.max_length:,}"
        if self.max_prompt_length is not None and prompt > self.max_prompt_length:
            return f"{prompt:,} prompt tokens exceed max_prompt_length {self.max_prompt_length:,}"
        return ""

    def _shortened(
        self, pair: Pair, index: int, chosen: _Tokens, rejected: _Tokens, too_long: str
    ) -> tuple[_Tokens, _Tokens]:
        """Apply `overlong`: drop, error, or shorten the prompt first by whole messages, then by tokens."""
        if self.overlong == "error":
            raise DataError(
                f"row {index}: {too_long}",
                "raise data.max_length, or set data.overlong to drop, truncate_prompt or truncate_response",
            )
        if self.overlong == "drop":
            raise Drop("overlong", too_long)

        shorter = list(_shorter_prompts(self._dialogue(pair, index)))
        if shorter and self._excess(chosen, rejected) > 0:

            def fits(prompt: tuple[Message, ...]) -> bool:
                return self._excess(*self._encode(self._texts(pair, prompt))) <= 0

            longest = min(bisect_left(shorter, True, key=fits), len(shorter) - 1)
            chosen, rejected = self._encode(self._texts(pair, shorter[longest]))
        excess = self._excess(chosen, rejected)
        if excess > 0:
            if min(chosen.start, rejected.start) - excess < 1:
                raise Drop("overlong", f"{too_long}, and no prompt is left beside the response")
            bos = int(self._has_bos(chosen.ids))
            chosen, rejected = chosen.without(bos, excess), rejected.without(bos, excess)
        if self.overlong == "truncate_response":
            if self.max_length - max(chosen.start, rejected.start) < self.min_response_tokens:
                raise Drop("overlong", f"{too_long}, and the prompt leaves no room for a response")
            chosen, rejected = chosen.first(self.max_length), rejected.first(self.max_length)
        return chosen, rejected

    def _excess(self, chosen: _Tokens, rejected: _Tokens) -> int:
        """How many tokens the prompt is too long by."""
        excess = 0
        if self.max_prompt_length is not None:
            excess = max(chosen.start, rejected.start) - self.max_prompt_length
        if self.overlong == "truncate_prompt":
            excess = max(excess, max(len(chosen.ids), len(rejected.ids)) - self.max_length)
        return excess


@dataclass(frozen=True)
class _Text:
    """One side of a pair as text, where its response starts, and the spans of its earlier assistant turns.

    Positions count characters. `guarded` text holds aliases for control tokens: only the guard's encoder reads it.
    """

    text: str
    start: int
    turns: tuple[tuple[int, int], ...] = ()
    guarded: bool = False

    def revealed(self, guard: Guard) -> _Text:
        """The same as the guard's encoder reads it."""

        def moved(position: int) -> int:
            return len(guard.reveal(self.text[:position]))

        turns = tuple((moved(begin), moved(end)) for begin, end in self.turns)
        return _Text(guard.reveal(self.text), moved(self.start), turns, guarded=True)


@dataclass(frozen=True)
class _Tokens:
    """One side of a pair as token ids (L,), where its response starts, its assistant mask (L,) if asked for."""

    ids: np.ndarray
    start: int
    mask: np.ndarray | None

    @property
    def response_tokens(self) -> int:
        return len(self.ids) - self.start

    def first(self, count: int) -> _Tokens:
        """The first `count` tokens."""
        return _Tokens(self.ids[:count], self.start, None if self.mask is None else self.mask[:count])

    def without(self, begin: int, count: int) -> _Tokens:
        """All but `count` tokens of the prompt from `begin` on."""
        kept = np.r_[:begin, begin + count : len(self.ids)]
        return _Tokens(self.ids[kept], self.start - count, None if self.mask is None else self.mask[kept])


def _through(suffix: str, end_of_turn: str) -> str:
    """`suffix` up to and including the end of turn; "" where it has none."""
    before, found, _ = suffix.partition(end_of_turn)
    return before + found if found else ""


def _written(content: str, after: str, text: str, position: int) -> int | None:
    """How many characters of `text` from `position` on are `content` as rendered, when `after` follows it.

    A template may write it trimmed, or only its end (without a think block).
    """
    for written in (content, content.strip()):
        if text.startswith(written + after, position):
            return len(written)
    end = text.find(after, position)
    return end - position if end >= 0 and text[position:end] in content else None


def _first_past(ends: np.ndarray, position: int) -> int:
    """The first token whose last character stands at `position` or later; their number if there is none."""
    return int(np.argmax(np.append(ends > position, True)))


# Characters; no common vocabulary has a longer token (some have runs of 128 blanks).
_LONGEST_TOKEN = 256


def _within(tokens: int, pair: Pair) -> Pair:
    """The pair less what no length policy could keep in so many tokens, so that megabytes in a row cost no more.

    Policies keep the end of a prompt and the beginning of an answer.
    """
    limit = _LONGEST_TOKEN * tokens
    prompt = pair.prompt
    if isinstance(prompt, str):
        prompt = prompt[-limit:]
    else:
        if len(prompt) > tokens:
            system = prompt[:1] if prompt[0].role == "system" else ()
            recent = prompt[-tokens:]
            first = next((i for i, message in enumerate(recent) if message.role == "user"), len(recent) - 1)
            prompt = (*system, *recent[first:])
        if any(len(message.content) > limit for message in prompt):
            prompt = tuple(replace(message, content=message.content[-limit:]) for message in prompt)
    return replace(
        pair,
        prompt=prompt,
        chosen=pair.chosen[:limit],
        rejected=pair.rejected[:limit],
        system=pair.system and pair.system[-limit:],
    )


def _shorter_prompts(prompt: tuple[Message, ...] | str) -> Iterator[tuple[Message, ...]]:
    """The dialogue without its oldest messages: from each later user turn on, at last from the last message.

    The system turn stays. A string has nothing shorter.
    """
    if isinstance(prompt, str):
        return
    system = prompt[:1] if prompt and prompt[0].role == "system" else ()
    turns = prompt[len(system) :]
    for i in range(1, len(turns)):
        if turns[i].role == "user" or i == len(turns) - 1:
            yield (*system, *turns[i:])
