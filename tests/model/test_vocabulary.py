"""Every token has a row, and a row that was never trained starts at the mean of the others."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from orpo_cli.errors import ModelError
from orpo_cli.model.vocabulary import embedding_names, fit_vocabulary


def grown(tiny_base: Path, tokens: list[str], tied: bool = False):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    config = AutoConfig.from_pretrained(tiny_base, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    return model, tokenizer, [tokenizer.convert_tokens_to_ids(token) for token in tokens]


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_get_rows_at_the_mean(tiny_base, tied):
    model, tokenizer, ids = grown(tiny_base, ["<|a|>", "<|b|>"], tied)
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    fresh = fit_vocabulary(model, tokenizer, ids, ids)
    assert fresh.added == ids
    assert fresh.untrained == []
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (inputs is outputs) == tied
    assert torch.equal(inputs[: len(before)], before)
    for row in ids:
        torch.testing.assert_close(inputs[row], before.mean(0))
        torch.testing.assert_close(outputs[row], head.mean(0))
    assert embedding_names(model) == ("model.embed_tokens", None if tied else "lm_head")


def test_rows_that_were_never_trained_are_found_and_start_at_the_mean_of_the_others(tiny_base):
    model, tokenizer, _ = grown(tiny_base, [])
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[5] = 1e-9  # as in Llama 3's reserved tokens
        weight[6] = weight[7]
    fresh = fit_vocabulary(model, tokenizer, [4, 5, 6], [])
    assert fresh.untrained == [5, 6]
    others = [i for i in range(len(weight)) if i not in (5, 6)]
    torch.testing.assert_close(weight[5], weight[others].mean(0))
    assert fit_vocabulary(model, tokenizer, [4], []).untrained == []


def test_spare_rows_of_the_model_stay(tiny_base):
    model, tokenizer, _ = grown(tiny_base, [])
    model.resize_token_embeddings(300)
    assert fit_vocabulary(model, tokenizer, [], []).added == []
    assert len(model.get_input_embeddings().weight) == 300


def test_a_tokenizer_of_another_model_is_refused(tiny_base):
    model, tokenizer, _ = grown(tiny_base, [])
    tokenizer.add_tokens([f"word{i}" for i in range(1000)])
    with pytest.raises(ModelError, match="do not belong together"):
        fit_vocabulary(model, tokenizer, [], [])


def test_new_tokens_that_fall_into_spare_rows_are_fresh_too(tiny_base):
    model, tokenizer, ids = grown(tiny_base, ["<|a|>", "<|b|>"])
    model.resize_token_embeddings(320)
    fresh = fit_vocabulary(model, tokenizer, ids, ids)
    assert (fresh.added, fresh.untrained) == ([], ids)
    weight = model.get_input_embeddings().weight
    torch.testing.assert_close(weight[ids[0]], weight[[i for i in range(320) if i not in ids]].mean(0))


def test_a_row_that_was_trained_in_one_matrix_stays_there(tiny_base):
    model, tokenizer, _ = grown(tiny_base, [])
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = 0
    before = model.get_input_embeddings().weight[5].clone()
    assert fit_vocabulary(model, tokenizer, [5], []).untrained == [5]
    assert torch.equal(model.get_input_embeddings().weight[5], before)
    assert model.get_output_embeddings().weight[5].norm() > 0
