"""Recipes as people get them wrong, whole ones: the command says the line, the key and what to write, and exits with 2.

The line that is at fault ends with `# <-`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

MODEL = "model:\n  name_or_path: meta-llama/Llama-3.1-8B\n"
DATA = "data:\n  train: mlabonne/orpo-dpo-mix-40k\n"

# What is wrong -> the recipe, the key that is named, and the hint to its end.
TYPOS = {
    "a letter too few": (
        f"{MODEL}{DATA}train:\n  learning_rat: 1e-5  # <-\n",
        "train.learning_rat",
        "did you mean train.learning_rate?",
    ),
    "two letters in the wrong order": (
        f"{MODEL}{DATA}  max_lenght: 2048  # <-\n",
        "data.max_lenght",
        "did you mean data.max_length?",
    ),
    "a misspelt section": (f"{MODEL}{DATA}outptu:  # <-\n  dir: runs/a\n", "outptu", "did you mean output?"),
    "hyphens": (
        f"{MODEL}{DATA}train:\n  weight-decay: 0.1  # <-\n",
        "train.weight-decay",
        "did you mean train.weight_decay?",
    ),
    "capitals": (f"{MODEL}{DATA}lora:\n  Alpha: 16  # <-\n", "lora.Alpha", "did you mean lora.alpha?"),
    "a key in another's section": (
        f"{MODEL}{DATA}train:\n  max_length: 512  # <-\n",
        "train.max_length",
        "did you mean data.max_length?",
    ),
    "a key in no section": (f"{MODEL}{DATA}beta: 0.2  # <-\n", "beta", "did you mean loss.beta?"),
    "a misspelt key of a source": (
        f"{MODEL}data:\n  train:\n    - path: a.jsonl\n      slpit: train  # <-\n",
        "data.train.0.slpit",
        "did you mean data.train.0.split?",
    ),
    "a misspelt operator": (
        f"{MODEL}{DATA}  filter:\n    - {{column: score, gte: 8}}  # <-\n",
        "data.filter.0.gte",
        "did you mean data.filter.0.ge?",
    ),
    "a misspelt choice": (
        f"{MODEL}{DATA}train:\n  lr_scheduler_type: cosin  # <-\n",
        "train.lr_scheduler_type",
        "did you mean cosine?",
    ),
    "a key given twice": (
        f"{MODEL}{DATA}train:\n  seed: 1\n  batch_size: 8\n  seed: 2  # <-\n",
        "train.seed",
        "remove one of the two",
    ),
}
OTHERS = {
    "axolotl: base_model": (f"base_model: a/B  # <-\n{DATA}", "base_model", "did you mean model.name_or_path?"),
    "axolotl: sequence_len": (
        f"{MODEL}{DATA}sequence_len: 4096  # <-\n",
        "sequence_len",
        "did you mean data.max_length?",
    ),
    "axolotl: orpo_alpha": (
        f"{MODEL}{DATA}orpo_alpha: 0.1  # <-\n",
        "orpo_alpha",
        "did you mean loss.beta? (the weight of the odds-ratio term)",
    ),
    "axolotl: micro_batch_size": (
        f"{MODEL}{DATA}train:\n  micro_batch_size: 2  # <-\n",
        "train.micro_batch_size",
        "did you mean train.batch_size? (pairs an optimizer step, over all devices; micro-batches are cut by "
        "train.max_tokens_per_microbatch)",
    ),
    "axolotl: val_set_size": (
        f"{MODEL}{DATA}val_set_size: 0.05  # <-\n",
        "val_set_size",
        "did you mean data.eval.holdout? (a share, or a number of pairs if an integer: {holdout: 0.02})",
    ),
    "axolotl: sample_packing": (
        f"{MODEL}{DATA}sample_packing: true  # <-\n",
        "sample_packing",
        "not needed: pairs are packed without padding by themselves",
    ),
    "axolotl: adapter": (
        f"{MODEL}{DATA}adapter: qlora  # <-\n",
        "adapter",
        "did you mean lora? (LoRA is the default; qlora is model.load_in_4bit: true)",
    ),
    "LLaMA-Factory: cutoff_len": (
        f"{MODEL}{DATA}  cutoff_len: 2048  # <-\n",
        "data.cutoff_len",
        "did you mean data.max_length?",
    ),
    "LLaMA-Factory: pref_beta": (
        f"{MODEL}{DATA}loss:\n  pref_beta: 0.1  # <-\n",
        "loss.pref_beta",
        "did you mean loss.beta?",
    ),
    "LLaMA-Factory: lora_rank": (
        f"{MODEL}{DATA}lora:\n  lora_rank: 8  # <-\n",
        "lora.lora_rank",
        "did you mean lora.r?",
    ),
    "LLaMA-Factory: quantization_bit": (
        f"{MODEL}  quantization_bit: 4  # <-\n{DATA}",
        "model.quantization_bit",
        "did you mean model.load_in_4bit? (load_in_4bit: true is NF4 with double quantisation)",
    ),
    "LLaMA-Factory: pref_loss": (
        f"{MODEL}{DATA}loss:\n  pref_loss: orpo  # <-\n",
        "loss.pref_loss",
        "not needed: the method is always ORPO",
    ),
    "TRL: per_device_train_batch_size": (
        f"{MODEL}{DATA}train:\n  per_device_train_batch_size: 4  # <-\n",
        "train.per_device_train_batch_size",
        "did you mean train.batch_size? (pairs an optimizer step, over all devices; micro-batches are cut by "
        "train.max_tokens_per_microbatch)",
    ),
    "TRL: bf16": (
        f"{MODEL}  bf16: true  # <-\n{DATA}",
        "model.bf16",
        "did you mean model.dtype? (write dtype: bfloat16, float16 or float32)",
    ),
    "TRL: report_to": (
        f"{MODEL}{DATA}train:\n  report_to: wandb  # <-\n",
        "train.report_to",
        "did you mean output.trackers? (a list; [] reports nowhere else than to metrics.jsonl)",
    ),
    "TRL: ref_model": (
        f"{MODEL}  ref_model: a/B  # <-\n{DATA}",
        "model.ref_model",
        "not needed: ORPO has no reference model",
    ),
    "alignment-handbook: dataset_mixer": (
        f"{MODEL}data:\n  train: a.jsonl\n  dataset_mixer: {{a/b: 1.0}}  # <-\n",
        "data.dataset_mixer",
        "did you mean data.train? (a hub id, file, glob or directory, or a list of {path, name, split})",
    ),
    "alignment-handbook: use_flash_attention_2": (
        f"{MODEL}  use_flash_attention_2: true  # <-\n{DATA}",
        "model.use_flash_attention_2",
        "did you mean model.attn_implementation? (write attn_implementation: flash_attention_2, sdpa or eager)",
    ),
    "another's word for a value": (
        f"{MODEL}{DATA}train:\n  optimizer: adamw_bnb_8bit  # <-\n",
        "train.optimizer",
        "did you mean adamw_8bit?",
    ),
}
TYPES = {
    "a number in quotes": (
        f'{MODEL}{DATA}train:\n  batch_size: "16"  # <-\n',
        "train.batch_size",
        "write 16 without quotes",
    ),
    "a whole number with a point": (f"{MODEL}{DATA}train:\n  max_steps: 100.0  # <-\n", "train.max_steps", "write 100"),
    "yes": (f"{MODEL}  load_in_4bit: yes  # <-\n{DATA}", "model.load_in_4bit", "write true"),
    "None": (f"{MODEL}{DATA}  max_prompt_length: None  # <-\n", "data.max_prompt_length", "write null"),
    "one thing for a list": (
        f"{MODEL}{DATA}train:\n  sample_prompts: Why?  # <-\n",
        "train.sample_prompts",
        "write a list: [Why?]",
    ),
    "a revision that looks like a number": (
        f"{MODEL}  revision: 20240501  # <-\n{DATA}",
        "model.revision",
        'write "20240501", in quotes, if the text is meant',
    ),
    "a value left blank": (
        f"{MODEL}{DATA}loss:\n  beta:  # <-\n",
        "loss.beta",
        "write a value, or remove the line to take the default",
    ),
    "a thousands separator": (f"{MODEL}{DATA}train:\n  save_steps: 1,000  # <-\n", "train.save_steps", "write 1000"),
    "a percentage": (f"{MODEL}{DATA}  eval: {{holdout: 5%}}  # <-\n", "data.eval.holdout", "write 0.05"),
    "a negative rate": (f"{MODEL}{DATA}train:\n  learning_rate: -1e-5  # <-\n", "train.learning_rate", None),
    "a tab": (f"{MODEL}{DATA}train:\n\tseed: 1  # <-\n", "not valid YAML", "indent with spaces, not tabs"),
}
IMPOSSIBLE = {
    "4 bits in a full fine-tune": (
        f"{MODEL}  load_in_4bit: true  # <-\nlora: null\n{DATA}",
        "model.load_in_4bit",
        "set it to false, or remove lora: null to train an adapter",
    ),
    "4 and 8 bits": (
        f"{MODEL}  load_in_4bit: true\n  load_in_8bit: true  # <-\n{DATA}",
        "model.load_in_8bit",
        "set one of load_in_4bit and load_in_8bit to false",
    ),
    "evaluations of nothing": (
        f"{MODEL}{DATA}train:\n  eval_steps: 50  # <-\n",
        "train.eval_steps",
        "hold some pairs out, e.g. data.eval: {holdout: 0.02}, or remove it",
    ),
    "a prompt that leaves no room": (
        f"{MODEL}{DATA}  max_length: 512\n  max_prompt_length: 512  # <-\n",
        "data.max_prompt_length",
        "make it smaller than data.max_length, or remove it",
    ),
    "a warm-up as long as the run": (
        f"{MODEL}{DATA}train:\n  max_steps: 50\n  warmup_steps: 100  # <-\n",
        "train.warmup_steps",
        "make it smaller than train.max_steps",
    ),
    "settings of an adapter that has its own": (
        f"{MODEL}{DATA}lora:\n  adapter: runs/a/adapter\n  r: 64  # <-\n",
        "lora.r",
        "remove r, or remove adapter to begin a new one",
    ),
    "flash attention in float32": (
        f"{MODEL}  dtype: float32\n  attn_implementation: flash_attention_2  # <-\n{DATA}",
        "model.attn_implementation",
        "set model.dtype to bfloat16, or attn_implementation to auto",
    ),
    "assistant turns where there are no turns": (
        f"{MODEL}  chat_template: none\n{DATA}loss:\n  nll_tokens: assistant  # <-\n",
        "loss.nll_tokens",
        "use response or all",
    ),
    "a filter with two operators": (
        f"{MODEL}{DATA}  filter:\n    - {{column: score, ge: 1, lt: 5}}  # <-\n",
        "data.filter.0",
        None,
    ),
}
WRONG = {**TYPOS, **OTHERS, **TYPES, **IMPOSSIBLE}


def test_there_are_forty() -> None:
    assert len(WRONG) >= 40


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe(name: str, orpo, tmp_path: Path) -> None:
    text, key, hint = WRONG[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    [line] = [number for number, content in enumerate(text.splitlines(), 1) if content.endswith("# <-")]
    code, out, err = orpo("train", path)
    assert (code, out) == (2, "")
    error, *hints = err.splitlines()
    assert error.startswith(f"error: {path}:{line}: {key}"), err
    assert hints == ([f"hint: {hint}"] if hint else []), err
