"""What models answer to held-out prompts, side by side: how diverse it is, and whose answers a judge prefers.

The judge is a reward model, a sequence classifier of one logit, as for the paper's own win rates. N prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orpo_cli.data.formats import Message, Pair
from orpo_cli.data.keys import prompt_key
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.diversity import lexical_diversity
from orpo_cli.errors import ModelError
from orpo_cli.generate import Speaker, answers_to, dialogue_ids, prompt_ids
from orpo_cli.model.build import TextSide
from orpo_cli.statistics import bootstrap, sign_test


@dataclass(frozen=True)
class Question:
    """A held-out prompt, and the response that was chosen there."""

    index: int
    """Position of its row."""
    pair: Pair

    @property
    def messages(self) -> list[Message]:
        """The dialogue up to the answer."""
        if not isinstance(self.pair.prompt, str):
            return list(self.pair.prompt)
        system = [Message("system", self.pair.system)] if self.pair.system else []
        return [*system, Message("user", self.pair.prompt)]

    @property
    def text(self) -> str:
        """The prompt to be read: a single user turn as it is, else each turn after its role."""
        turns = self.messages
        if len(turns) == 1:
            return turns[0].content
        return "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


@dataclass(frozen=True)
class Answer:
    """What a model said, and whether it ended its turn by itself."""

    text: str
    ended: bool


def questions(pairs: Sequence[tuple[int, Pair]], count: int | None) -> list[Question]:
    """Different prompts of the pairs, `count` of them evenly spread over all; None: all."""
    different: dict[bytes, Question] = {}
    for index, pair in pairs:
        different.setdefault(prompt_key(pair), Question(index, pair))
    found = list(different.values())
    if count is None or count >= len(found):
        return found
    return [found[i * len(found) // count] for i in range(count)]


def answer_all(speaker: Speaker, asked: Sequence[Question], read: Iterable[TokenizedPair]) -> list[Answer]:
    """The model's answer to each question, rendered as in training.

    `read`: the pairs as the model reads them. Of a prompt that the length policy has cut there, what it left is asked.
    """
    cut = {pair.index: pair.chosen_ids[: pair.chosen_start].tolist() for pair in read if pair.truncated}
    prompts = [cut.get(question.index) or question_ids(speaker.text, question.pair) for question in asked]
    return [Answer(*said) for said in answers_to(speaker.model, speaker.text, prompts, speaker.sampling)]


def question_ids(text: TextSide, pair: Pair) -> list[int]:
    """Token ids of a pair's whole prompt."""
    if isinstance(pair.prompt, str):
        return prompt_ids(text, pair.prompt, pair.system)
    return dialogue_ids(text, pair.prompt)


def describe(answers: Mapping[str, Sequence[Answer]], asked: Sequence[Question]) -> dict[str, Any]:
    """How many answers of each model ended, and the lexical diversity of them and of the chosen responses."""
    return {
        "prompts": len(asked),
        **{
            who: {
                "ended": float(np.mean([answer.ended for answer in said])),
                **lexical_diversity([answer.text for answer in said]),
            }
            for who, said in answers.items()
        },
        "chosen": lexical_diversity([question.pair.chosen for question in asked]),
    }


def side_by_side(answers: Mapping[str, Sequence[Answer]], asked: Sequence[Question]) -> list[dict[str, Any]]:
    """One object a prompt: the chosen response, and each model's answer with whether it ended."""
    return [
        {
            "index": question.index,
            "prompt": question.text,
            "chosen": question.pair.chosen,
            **{who: said[i].text for who, said in answers.items()},
            **{f"{who}_ended": said[i].ended for who, said in answers.items()},
        }
        for i, question in enumerate(asked)
    ]


def alpaca_eval(said: Sequence[Answer], asked: Sequence[Question], generator: str) -> list[dict[str, str]]:
    """The answers in the shape that AlpacaEval reads its model outputs in."""
    return [
        {"instruction": question.text, "output": answer.text, "generator": generator}
        for question, answer in zip(asked, said, strict=True)
    ]


# ---- the judge ----


@dataclass(frozen=True)
class Judge:
    """A reward model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def ids(self, messages: Sequence[Message], answer: str) -> list[int]:
        """The token ids that are judged: by the tokenizer's chat template, else prompt and answer as a pair of texts.

        Of what is longer than the judge's context, the end counts.
        """
        if self.tokenizer.chat_template:
            ids = self.tokenizer(judged_text(self.tokenizer, messages, answer), add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer("\n\n".join(turn.content for turn in messages), answer).input_ids
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return ids[-context:] if context else ids

    def reward(self, messages: Sequence[Message], answer: str) -> float:
        """The judge's logit."""
        ids = torch.tensor([self.ids(messages, answer)], device=self.model.device)
        with torch.no_grad():
            return float(self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])


def judged_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: str) -> str:
    """What is judged, by the tokenizer's chat template; where it has no system turns, the user's begins with that text.

    Raises ModelError for a dialogue that the template refuses.
    """
    asked = list(messages)
    while True:
        turns = [{"role": turn.role, "content": turn.content} for turn in [*asked, Message("assistant", answer)]]
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # whatever a stranger's template does wrong
            if [turn.role for turn in asked[:2]] != ["system", "user"]:
                roles = ", ".join(turn["role"] for turn in turns)
                raise ModelError(
                    f"the judge's chat template refuses a dialogue of {roles}: {error}",
                    "name another --judge, or data with the turns that it knows",
                ) from None
            system, user, *others = asked
            asked = [Message("user", f"{system.content}\n\n{user.content}"), *others]


def require_judgeable(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question]) -> None:
    """Raise ModelError where a judge's chat template refuses one of the questions."""
    if tokenizer.chat_template:
        for question in asked:
            judged_text(tokenizer, question.messages, question.pair.chosen)


def rewards(judge: Judge, answers: Mapping[str, Sequence[Answer]], asked: Sequence[Question]) -> dict[str, np.ndarray]:
    """The rewards (N,) of the chosen responses and of each model's answers."""
    texts = {
        "chosen": [question.pair.chosen for question in asked],
        **{who: [answer.text for answer in said] for who, said in answers.items()},
    }
    prompts = [question.messages for question in asked]
    return {who: np.array([judge.reward(*of) for of in zip(prompts, said, strict=True)]) for who, said in texts.items()}


def win_rates(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean rewards, and how often the model's answer has a higher one than the others', a tie as half a win.

    Each with its bootstrap 95 % interval, prompts resampled; `p_sign` is the exact sign test's, ties left out.
    """
    figures: dict[str, Any] = {}
    means, low, high = bootstrap(np.stack(list(found.values())))
    for i, who in enumerate(found):
        figures[f"{who}_reward"] = float(means[i])
        figures[f"{who}_reward_ci95"] = [float(low[i]), float(high[i])]
    for who, other in found.items():
        if who == "model":
            continue
        outcome = np.sign(found["model"] - other)
        wins, losses = int((outcome > 0).sum()), int((outcome < 0).sum())
        [rate], [low_rate], [high_rate] = bootstrap((1 + outcome[None]) / 2)
        figures[f"against_{who}"] = {
            "win_rate": float(rate),
            "win_rate_ci95": [float(low_rate), float(high_rate)],
            "wins": wins,
            "ties": len(outcome) - wins - losses,
            "losses": losses,
            "p_sign": sign_test(wins, losses),
        }
    return figures
