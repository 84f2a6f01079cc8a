"""Adapters: what peft is asked for, and what is written for it to read."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from orpo_cli.errors import ModelError
from orpo_cli.model.lora import add_lora, load_adapter, save_adapter
from orpo_cli.recipe import LoraSection
from tests.tiny import tiny_model


@pytest.fixture
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base)


def trained(model) -> set[str]:
    return {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad for n in [n.split(".lora")[0]]}


def test_all_linear_is_every_projection_but_the_head(base):
    model = add_lora(base, LoraSection(r=4, exclude_modules=["down_proj"]), [])
    assert trained(model) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_adapters_of_a_bfloat16_base_are_float32(tiny_base):
    model = add_lora(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16), LoraSection(), [])
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}


@pytest.mark.parametrize(
    "keys",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"rank_pattern": {"down_proj": 8}},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"modules_to_save": ["lm_head"]},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_each_setting_reaches_the_adapter_and_survives_saving(base, tiny_base, tmp_path, keys):
    torch.manual_seed(0)
    model = add_lora(base, LoraSection(r=4, **keys), [])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model, tmp_path, base=str(tiny_base), revision="main")
    ids = torch.arange(3, 40)[None]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path).eval()
    torch.testing.assert_close(stock(ids).logits, model.eval()(ids).logits)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert not torch.allclose(stock(ids).logits, fresh(ids).logits)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    for key, value in keys.items():
        assert saved[{"dropout": "lora_dropout"}.get(key, key)] == value


def test_lists_in_the_adapter_config_are_sorted(base, tiny_base, tmp_path):
    save_adapter(add_lora(base, LoraSection(), []), tmp_path, base=str(tiny_base), revision="main")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == str(tiny_base)


def test_modules_that_are_not_there_are_an_error_that_names_those_that_are(base):
    with pytest.raises(ModelError) as caught:
        add_lora(base, LoraSection(target_modules=["query_key_value"]), [])
    assert "q_proj" in caught.value.hint


def test_a_target_that_matches_nothing_beside_one_that_does_is_refused(base):
    with pytest.raises(ModelError, match=r"no module is called v_prj$") as error:
        add_lora(base, LoraSection(target_modules=["q_proj", "v_prj"]), [])
    assert "v_proj" in error.value.hint
    assert add_lora(base, LoraSection(target_modules=["self_attn.q_proj", "v_proj"]), [])


@pytest.mark.parametrize(
    ("keys", "told", "hint"),
    [
        ({"exclude_modules": ["q_proj", "nope"]}, "exclude_modules: no layer is called nope", "q_proj"),
        ({"exclude_modules": ["self_attn"]}, "exclude_modules: no layer is called self_attn", "q_proj"),
        ({"modules_to_save": ["lm_head", "nope"]}, "modules_to_save: no module is called nope", "say embed_tokens or"),
        ({"rank_pattern": {"q_proj": 3, "no.*": 3}}, r"no layer with an adapter is called no\.\*", "down_proj"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}}, "is called v_proj", "have one: q_proj"),
        ({"rank_pattern": {"(": 3}}, "LoRA cannot be added: missing \\)", "q_proj"),
    ],
)
def test_no_name_is_passed_over(base, keys, told, hint):
    warnings.simplefilter("error", RuntimeWarning)  # pytest has its own back behind the test
    with pytest.raises(ModelError, match=told) as error:
        add_lora(base, LoraSection(**keys), [])
    assert hint in error.value.hint
    assert "base_layer" not in error.value.hint


def test_experts_that_are_parameters_have_ranks_by_their_names():
    model = add_lora(tiny_model("mixtral"), LoraSection(r=8, rank_pattern={"gate_up_proj": 3}), [])
    assert {p.shape[0] % 3 for n, p in model.named_parameters() if "lora_A" in n and "gate_up" in n} <= {0}
    with pytest.raises(ModelError, match="is called experts"):
        add_lora(tiny_model("mixtral"), LoraSection(rank_pattern={"experts": 3}), [])


def test_embeddings_that_are_saved_whole_have_no_rows_of_their_own(base):
    whole = add_lora(base, LoraSection(modules_to_save=["model.embed_tokens", "lm_head"]), [3, 4])
    assert whole(torch.arange(3, 9)[None]).logits.isfinite().all()
    assert not any("trainable_tokens" in name for name, _ in whole.named_parameters())


def test_an_adapter_goes_on_from_another(base, tiny_base, tmp_path):
    model = add_lora(base, LoraSection(r=3), [])
    save_adapter(model, tmp_path, base=str(tiny_base), revision="main")
    again = add_lora(AutoModelForCausalLM.from_pretrained(tiny_base), LoraSection(adapter=str(tmp_path)), [])
    assert again.peft_config["default"].r == 3
    assert any(p.requires_grad for n, p in again.named_parameters() if "lora_A" in n)


def test_what_is_no_adapter_is_refused(base, tmp_path):
    for name, said in ((tmp_path, "is no adapter"), (tmp_path / "nowhere", "there is no directory")):
        with pytest.raises(ModelError, match=said):
            load_adapter(base, name)


def test_a_pickled_adapter_is_not_loaded(base, tiny_base, tmp_path):
    save_adapter(add_lora(base, LoraSection(), []), tmp_path, base=str(tiny_base), revision="main")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path)


def test_an_adapter_without_rows_for_new_tokens_is_refused(base, tiny_base, tmp_path):
    save_adapter(add_lora(base, LoraSection(r=3), []), tmp_path, base=str(tiny_base), revision="main")
    with pytest.raises(ModelError, match="no rows for the template"):
        add_lora(AutoModelForCausalLM.from_pretrained(tiny_base), LoraSection(adapter=str(tmp_path)), [3, 4])


def test_a_head_with_a_bias_is_trained_whole_or_refused():
    model = tiny_model("phi")
    with pytest.raises(ModelError, match="bias") as caught:
        add_lora(model, LoraSection(), [3])
    assert "modules_to_save: [lm_head]" in caught.value.hint
    adapted = add_lora(tiny_model("phi"), LoraSection(modules_to_save=["lm_head"]), [3])
    assert adapted.peft_config["default"].trainable_token_indices == {"embed_tokens": [3]}
