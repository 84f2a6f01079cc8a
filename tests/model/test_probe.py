"""The probe: it finds what is wrong, in every dtype, refuses nothing that is right, and leaves the model as it was."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orpo_cli.data.batches import Segment, flat_batch
from orpo_cli.model import attention, probe
from orpo_cli.model.attention import Layout, shared_prefix_attention
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.probe import Fitness, probe_batch, why_full_logits, why_not_shared
from tests.tiny import FAMILIES, random_pairs, tiny_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_finds_what_float32_finds(name, dtype):
    fitness, exact = Fitness.of(tiny_model(name).to(dtype)), Fitness.of(tiny_model(name))
    assert (fitness.not_shared, fitness.full_logits) == (exact.not_shared, exact.full_logits)


def without_the_last_shared_token(module, query, key, value, mask, *, layout, **keywords):
    """Each rejected branch sees its prompt but for the last token."""
    segments = [Segment(s.start, s.shared - 1, s.chosen + 1, s.rejected) for s in layout.segments]
    return shared_prefix_attention(module, query, key, value, mask, layout=Layout(segments, query.device), **keywords)


def without_the_prompt(module, query, key, value, mask, *, layout, **keywords):
    segments = [Segment(s.start, 0, s.shared + s.chosen, s.rejected) for s in layout.segments]
    return shared_prefix_attention(module, query, key, value, mask, layout=Layout(segments, query.device), **keywords)


def as_one_text(module, query, key, value, mask, *, layout, **keywords):
    """Each rejected branch sees the chosen one, and the pair before it."""
    [first, *_], last = layout.segments, layout.segments[-1]
    segments = [Segment(first.start, 1, last.stop - 2, 1)]
    return shared_prefix_attention(module, query, key, value, mask, layout=Layout(segments, query.device), **keywords)


def with_another_scale(module, *args, scaling=None, **keywords):
    return shared_prefix_attention(module, *args, scaling=0.7 * scaling, **keywords)


@pytest.mark.parametrize("fault", [without_the_last_shared_token, without_the_prompt, as_one_text, with_another_scale])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "cohere", "qwen3_moe"])
def test_attention_that_is_wrong_is_found_out(name, dtype, fault, monkeypatch):
    model = tiny_model(name).to(dtype)
    monkeypatch.setattr(probe, "shared_prefix_attention", fault)
    assert "log-probs differ by" in why_not_shared(model)


def test_a_model_that_hardly_attends_is_probed_as_sharply(monkeypatch):
    """Freshly initialised: bfloat16 rounds its log-probs by little, and what is wrong changes them by little."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5)
    model.to(torch.bfloat16)
    assert why_not_shared(model) is None
    monkeypatch.setattr(probe, "shared_prefix_attention", without_the_prompt)
    assert why_not_shared(model) is not None


@pytest.mark.parametrize("rows", [2, 3, 7, 63])
def test_few_vocabulary_rows_are_enough(rows):
    model = tiny_model("llama", vocab_size=rows, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    assert int(probe_batch(model).input_ids.max()) < rows
    assert Fitness.of(model).remark is None


@pytest.mark.parametrize("positions", [2, 3, 5, 19])
@pytest.mark.parametrize("name", ["gpt2", "opt"])  # one row for each position, and no more
def test_a_short_context_is_respected(name, positions):
    model = tiny_model(name, max_position_embeddings=positions)
    batch = probe_batch(model)
    assert int(batch.position_ids.max()) < positions
    assert all(segment.chosen and segment.rejected for segment in batch.segments)
    assert Fitness.of(model).remark is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_a_quantised_base_is_judged_by_its_own_rounding(name, dtype, bits, tmp_path, monkeypatch):
    tiny_model(name).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    ).train()
    assert Fitness.of(model).remark is None
    monkeypatch.setattr(probe, "shared_prefix_attention", without_the_prompt)
    assert "log-probs differ by" in why_not_shared(model)


def test_a_head_that_cannot_be_had_apart_leaves_full_logits():
    model, batch = tiny_model("llama"), flat_batch(random_pairs(3), "response")
    expected = PairLogprobs(tiny_model("llama"), shares_prefix=True)(batch)
    model.base_model_prefix = "nothing"  # then transformers takes the model for its own backbone
    fitness = Fitness.of(model)
    assert why_full_logits(model) == "its head cannot be computed apart from its backbone (AttributeError)"
    assert fitness.remark == f"the logits of all tokens are computed: {fitness.full_logits}"
    torch.testing.assert_close(fitness.logprobs(model)(batch), expected, atol=1e-5, rtol=1e-5)


def test_a_reason_given_beforehand_is_the_reason():
    model = tiny_model("llama")
    fitness = Fitness.of(model, not_shared="model.shared_prefix is false")
    assert fitness.remark == "prompts are not shared between a pair's answers: model.shared_prefix is false"
    assert not fitness.logprobs(model).shares_prefix


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gpt_neo", "gemma2"])
def test_the_model_is_left_as_it_was(name):
    model = tiny_model(name).train()
    before = model.config._attn_implementation
    Fitness.of(model)
    assert model.config._attn_implementation == before
    assert all(module.training for module in model.modules())
    assert attention.AttentionInterface()[attention.NAME] is shared_prefix_attention
