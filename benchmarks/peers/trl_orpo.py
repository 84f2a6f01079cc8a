"""TRL's ORPOTrainer on the bench's model and pairs, in TRL's own environment; prints one JSON object.

    python trl_orpo.py MODEL PAIRS MICRO_BATCH BATCH STEPS

Speed is taken over the optimizer steps alone; memory is the whole process's peak.
"""

import json
import resource
import sys
import time

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

model_name, pairs, micro, batch, steps = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])


class Clock(TrainerCallback):
    """Notes when each step begins and ends, and the first loss."""

    def __init__(self):
        self.begun, self.seconds, self.loss = 0.0, [], None

    def on_step_begin(self, *args, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.begun)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = self.loss or (logs or {}).get("loss")


clock = Clock()
tokenizer = AutoTokenizer.from_pretrained(model_name)
trainer = ORPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16),
    args=ORPOConfig(
        output_dir="unused",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        max_steps=steps,
        max_length=1024,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_dropout=True,
        beta=0.1,
        dataloader_num_workers=0,
        remove_unused_columns=False,
    ),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[clock],
)
trainer.train()
print(
    json.dumps(
        {
            "seconds": clock.seconds,
            "pairs": batch * steps,
            "first_loss": clock.loss,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
    )
)
