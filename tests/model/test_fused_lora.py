"""The fused layers against peft's own forward: values, gradients, and what is left to peft."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orpo_cli.merge import merge_into_base
from orpo_cli.model.fused_lora import fuse_lora
from orpo_cli.model.lora import add_lora
from orpo_cli.recipe import LoraSection
from tests.tiny import tiny_model


def adapted(base, **keys):
    torch.manual_seed(1)
    model = add_lora(base, LoraSection(r=4, alpha=12, **keys), [])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def run(model, ids):
    model.zero_grad()
    logits = model(ids).logits
    logits.float().log_softmax(-1).diagonal(dim1=1, dim2=2).sum().backward()
    return logits.detach().float(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(one, other):
    return (one - other).norm() / other.norm()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])  # the latter two have biases
@pytest.mark.parametrize("keys", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj|query_key_value": 2}}], ids=str)
def test_float32_is_peft_to_rounding(family, keys):
    model, ids = adapted(tiny_model(family), **keys), torch.randint(3, 101, (2, 17))
    expected, gradients = run(model, ids)
    assert fuse_lora(model.get_base_model()) == sum("lora_A" in n for n, _ in model.named_parameters()) > 0
    got, fused = run(model, ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert fused.keys() == gradients.keys()
    for name in gradients:
        assert relative(fused[name], gradients[name]) < 1e-4, name


def test_bfloat16_is_as_near_to_float32_as_peft_is():
    ids = torch.randint(3, 101, (2, 17))
    exact, exact_gradients = run(adapted(tiny_model("llama")), ids)
    model = adapted(tiny_model("llama").to(torch.bfloat16))
    by_peft, peft_gradients = run(model, ids)
    fuse_lora(model.get_base_model())
    fused, fused_gradients = run(model, ids)
    assert relative(fused, exact) < 1.5 * relative(by_peft, exact)
    for name, gradient in exact_gradients.items():
        assert fused_gradients[name].dtype == torch.float32
        assert relative(fused_gradients[name], gradient) < 1.5 * relative(peft_gradients[name], gradient) + 0.02, name


def test_4bit_is_peft_to_rounding(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantised, dtype=torch.float32, device_map={"": "cpu"}
    )
    model, ids = adapted(base.train()), torch.randint(3, 96, (2, 17))
    expected, gradients = run(model, ids)
    assert fuse_lora(model.get_base_model()) == 14
    got, fused = run(model, ids)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    for name in gradients:
        assert relative(fused[name], gradients[name]) < 0.02, name


@pytest.mark.parametrize("keys", [{"use_dora": True}, {"dropout": 0.1}], ids=str)
def test_what_is_more_than_plain_is_left_to_peft(keys):
    assert fuse_lora(adapted(tiny_model("llama"), **keys).get_base_model()) == 0


def test_an_adapter_that_is_switched_off_or_merged_takes_no_part():
    model, ids = adapted(tiny_model("llama")), torch.randint(3, 101, (1, 9))
    fuse_lora(model.get_base_model())
    with torch.no_grad():
        trained = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
        torch.testing.assert_close(plain, tiny_model("llama")(ids).logits)
        assert not torch.allclose(trained, plain, atol=1e-3)
        torch.testing.assert_close(merge_into_base(model)(ids).logits, trained, rtol=1e-4, atol=1e-4)


def test_two_adapters_at_once_are_left_to_peft():
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    assert fuse_lora(model.get_base_model()) == 0
