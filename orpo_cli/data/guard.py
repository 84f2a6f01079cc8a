"""Control tokens that stand in the content of a message stay text: no data can end a turn, or begin one."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from orpo_cli.data.templates import control_pattern


class Guard:
    """Keeps control tokens in the content text, where the tokenizer would read them as control.

    Before rendering, `hide` puts placeholders in their place; afterwards `reveal` turns those back, and the control
    tokens that the template itself has written into aliases. `encoder` is the tokenizer with its control tokens
    renamed to these aliases: all other text, their own names too, is ordinary to it.
    """

    def __init__(self, tokenizer: Any, controls: Sequence[str]) -> None:
        # Unguessable, so that no data can forge an alias or a placeholder.
        nonce = secrets.token_hex(8)
        self._tokenizer = tokenizer
        self._aliases = {control: f"<|{nonce}.{i}|>" for i, control in enumerate(dict.fromkeys(controls))}
        self._placeholders = {control: f"Zq{nonce}x{i}x" for i, control in enumerate(self._aliases)}
        self._controls = control_pattern(list(self._aliases))
        self._revealed = self._aliases | {hidden: control for control, hidden in self._placeholders.items()}
        self._rendered = control_pattern(list(self._revealed))

    def found_in(self, contents: Iterable[str]) -> bool:
        """Whether any of the contents holds a control token."""
        return any(self._controls.search(content) for content in contents)

    def hide(self, content: str) -> str:
        """The content with placeholders for its control tokens."""
        return self._controls.sub(lambda match: self._placeholders[match.group()], content)

    def reveal(self, rendered: str) -> str:
        """The rendered text, or the beginning of one, as `encoder` reads it."""
        return self._rendered.sub(lambda match: self._revealed[match.group()], rendered)

    @cached_property
    def encoder(self) -> Tokenizer:
        """The tokenizer's backend with aliases for its control tokens."""
        return encoder_of(self._tokenizer, self._aliases)

    @cached_property
    def real_ids(self) -> np.ndarray:
        """int32 (V,): the tokenizer's id for each id of `encoder`."""
        ids = np.arange(self.encoder.get_vocab_size(), dtype=np.int32)
        for id_, token in self._tokenizer.added_tokens_decoder.items():
            ids[self.encoder.token_to_id(self._aliases.get(token.content, token.content))] = id_
        return ids


def encoder_of(tokenizer: Any, aliases: Mapping[str, str] | None = None) -> Tokenizer:
    """A copy of the tokenizer's backend that only encodes: adds, cuts and pads nothing, and trims no offsets.

    With `aliases`, tokens go by other names, and the text of their own names is ordinary.
    """
    if not aliases:
        copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        copy.post_processor = None
        copy.no_truncation()
        copy.no_padding()
        return copy
    spec = json.loads(encoder_of(tokenizer).to_str())
    for token in spec["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    # The model's vocabulary may hold them too: as {token: id} or, Unigram, as [[token, score], ...].
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {aliases.get(token, token): id_ for token, id_ in model["vocab"].items()}
    else:
        model["vocab"] = [[aliases.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        spelt = aliases.keys()
        model["merges"] = [merge for merge in model["merges"] if not {*merge, "".join(merge)} & spelt]
    if model.get("unk_token"):
        model["unk_token"] = aliases.get(model["unk_token"], model["unk_token"])
    return Tokenizer.from_str(json.dumps(spec))
