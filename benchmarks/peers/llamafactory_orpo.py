"""LLaMA-Factory's ORPO on the bench's model and pairs; prints one line of JSON, after what the tool itself prints.

    python llamafactory_orpo.py SETTINGS     (a JSON object; see the names read below)

Its environment, from the root of this repository. It goes without the web interface (gradio, modelscope) and without
torchaudio and torchvision, which serve sound and pictures:

    python3.11 -m venv ../llamafactory
    ../llamafactory/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    ../llamafactory/bin/pip install --no-deps llamafactory==0.9.5
    ../llamafactory/bin/pip install torch==2.13.0 transformers==5.6.0 trl==0.24.0 peft==0.18.1 accelerate==1.11.0
    ../llamafactory/bin/pip install torch==2.13.0 datasets==4.0.0 torchdata==0.11.0 av==16.0.0 'tyro<0.9' einops fastapi
    ../llamafactory/bin/pip install fire hf-transfer matplotlib omegaconf pandas protobuf scipy sentencepiece
    ../llamafactory/bin/pip install sse-starlette tiktoken uvicorn

pip will say that gradio, modelscope, torchaudio and torchvision are missing.

`run_exp` is what `llamafactory-cli train` calls. Micro-batch, checkpointing and autocast are the caller's to choose. It
draws no curves and saves only at its end. Attention is SDPA and AdamW fused, both by default; Liger's kernels, flash
attention and `pure_bf16` need a GPU.
"""

import importlib.util
import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

if importlib.util.find_spec("torchaudio") is None:  # imported at the top of a module, used for sound alone
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.data.template import register_template
from llamafactory.train.tuner import run_exp
from watch import Watch

settings = json.loads(sys.argv[1])
columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
dataset = {"file_name": settings["pairs"], "ranking": True, "columns": columns}
Path("dataset_info.json").write_text(json.dumps({"pairs": dataset}))
register_template("as_it_is")  # prompt and answer as they stand, and EOS; the tool's own `empty` leaves EOS out

watch = Watch()
run_exp(
    {
        "stage": "dpo",
        "pref_loss": "orpo",
        "pref_beta": 0.1,
        "do_train": True,
        "model_name_or_path": settings["model"],
        "finetuning_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset_dir": ".",
        "dataset": "pairs",
        "template": "as_it_is",
        "cutoff_len": settings["max_length"],
        "output_dir": "out",
        "per_device_train_batch_size": settings["micro"],
        "gradient_accumulation_steps": settings["batch"] // settings["micro"],
        "max_steps": settings["steps"],
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "disable_shuffling": True,  # the order in which we take the pairs
        "bf16": settings["autocast"],
        "disable_gradient_checkpointing": not settings["checkpointing"],
        "dataloader_num_workers": 0,  # a worker would take a core, and batches are tiny
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    },
    callbacks=[watch],
)
watch.report()
