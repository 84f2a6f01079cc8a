"""A trainer of TRL on the bench's model and pairs; prints one line of JSON.

    python trl_trainers.py SETTINGS     (a JSON object; see the names read below)

Its environment, from the root of this repository:

    python3.11 -m venv ../trl
    ../trl/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    ../trl/bin/pip install -c constraints.txt trl==1.16.0 peft     # for a 4-bit base: and bitsandbytes

Micro-batch, checkpointing and autocast are the caller's to choose, and so is the `trainer`; `config` sets any of its
options. Attention is SDPA and AdamW fused, both by default; Liger's kernels and flash attention need a GPU.
"""

import importlib
import json
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from watch import Watch

TRAINERS = {
    "orpo": ("trl.experimental.orpo", "ORPO", {"beta": 0.1}),
    "simpo": ("trl.experimental.cpo", "CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "dpo": ("trl", "DPO", {}),
    "sft": ("trl", "SFT", {}),  # on the chosen answers
}

settings = json.loads(sys.argv[1])
dtype = getattr(torch, settings.get("dtype", "bfloat16"))
quantised = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
evaluates = settings.get("evaluate", False)
module, name, own = TRAINERS[settings.get("trainer", "orpo")]
library = importlib.import_module(module)  # this one alone: the process is measured, imports and all
options = {
    "output_dir": "out",
    "per_device_train_batch_size": settings["micro"],
    "per_device_eval_batch_size": settings["micro"],
    "gradient_accumulation_steps": settings["batch"] // settings["micro"],
    "max_steps": settings["steps"],
    "max_length": settings["max_length"],
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",  # the order in which we take the pairs
    "bf16": settings["autocast"],
    "gradient_checkpointing": settings["checkpointing"],
    "prediction_loss_only": True,
    "dataloader_num_workers": 0,  # a worker would take a core, and batches are tiny
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "remove_unused_columns": False,
}
watch = Watch()
pairs = load_dataset("json", data_files=settings["pairs"], split="train")
if name == "SFT":
    pairs = pairs.rename_column("chosen", "completion").remove_columns("rejected")
trainer = getattr(library, f"{name}Trainer")(
    model=AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=dtype, quantization_config=quantised if settings.get("load_in_4bit") else None
    ),
    args=getattr(library, f"{name}Config")(**options | own | settings.get("config", {})),
    train_dataset=pairs.select(range(1)) if evaluates else pairs,
    eval_dataset=pairs if evaluates else None,
    processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    peft_config=lora if settings.get("lora", True) and not evaluates else None,
    callbacks=[watch],
)
if evaluates:
    figures = trainer.evaluate()
    told = {"loss": figures["eval_loss"], "accuracy": figures["eval_rewards/accuracies"]}
    print(json.dumps(told | {"pairs": len(pairs), "seconds": figures["eval_runtime"]}))
else:
    trainer.train()
    trainer.save_model(settings.get("output", "out"))  # what anyone would do, and we do
    watch.report()
