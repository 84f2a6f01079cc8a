"""The only caller of transformers' `from_pretrained`: tokenizers, configurations, base models.

Only safetensors are read, and a repository's own code runs only under `model.trust_remote_code`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from orpo_cli.errors import ModelError, OrpoError, is_out_of_memory
from orpo_cli.recipe.schema import ModelSection

# The libraries' own progress bars and advice would drown what the run says itself.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
huggingface_hub.utils.enable_progress_bars()  # but a download of many gigabytes shows its progress
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|bitsandbytes")

# A repository without safetensors is refused in our own words; nobody is asked to convert it, nothing is sent anywhere.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The base's tokenizer."""
    with _explained(section):
        _ask_hub(section)
        tokenizer = AutoTokenizer.from_pretrained(
            section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if odd := [name for name in templates if Path(name).name != name]:  # each is saved as a file of that name
        raise ModelError(f"{section.name_or_path} has a chat template named {odd[0]!r}", "rename or remove it")
    return tokenizer


def load_config(section: ModelSection) -> PreTrainedConfig:
    """The base's configuration; reads no weights."""
    with _explained(section):
        _ask_hub(section)
        config = AutoConfig.from_pretrained(
            section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    if "/" in str(config._attn_implementation) and not section.trust_remote_code:
        raise ModelError(
            f"{section.name_or_path} asks for attention code from the hub, {config._attn_implementation}",
            "remove attn_implementation from its config.json; if you trust it, set model.trust_remote_code: true",
        )
    return config


def _ask_hub(section: ModelSection) -> None:
    """Ask the hub for a model that is not here; where none answers, the libraries would ask for over a minute."""
    name, revision = section.name_or_path, section.revision
    if Path(name).exists() or is_path(name) or constants.HF_HUB_OFFLINE:
        return
    files = ("config.json", "tokenizer_config.json", "tokenizer.json")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(name, file, revision=revision), str) for file in files):
        return
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, files[0], revision=revision))
    except Exception as error:  # any other, the libraries ask again about, or tell
        if type(error).__name__ == "ConnectError":  # of whichever HTTP library the hub's is built on
            raise


def base_revision(section: ModelSection) -> str | None:
    """The commit of a hub model that has been loaded; None for a directory."""
    if Path(section.name_or_path).is_dir():
        return None
    cached = huggingface_hub.try_to_load_from_cache(section.name_or_path, "config.json", revision=section.revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


# Bytes of a weight file that go into a fingerprint: a file up to this size whole, of a larger one as many as this.
_SAMPLED_BYTES = 2**26


def base_content(section: ModelSection) -> str | None:
    """Sixteen hexadecimal digits that change with the files of a model's directory; None for a hub model.

    Configuration, index and code are taken whole, and of large weight files their sizes, their first MiB, which holds
    the names and shapes of all tensors, and pieces from all over them: another model, a fine-tune of the same one or
    another copy cut short are told apart in a second, where reading all of a large model would take minutes. A few
    bytes changed between the pieces are not seen.
    """
    directory = Path(section.name_or_path)
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    patterns = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.py")
    for path in sorted(file for pattern in patterns for file in directory.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            piece, steps = 2**20, _SAMPLED_BYTES // 2**20
            for i in range(steps):
                file.seek(i * piece if size <= _SAMPLED_BYTES else i * (size - piece) // (steps - 1))
                digest.update(file.read(piece))
    return digest.hexdigest()[:16]


def checked_config(section: ModelSection) -> PreTrainedConfig:
    """The configuration that a model is built from, its dropout switched off if the recipe says so."""
    config = load_config(section)
    if config.is_encoder_decoder:
        raise ModelError(f"{section.name_or_path} is an encoder-decoder", "orpo trains causal language models")
    if section.disable_dropout:
        disable_dropout(config)
    return config


def compute_dtype(section: ModelSection, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype the model computes in. `auto`: float32 if its weights are stored so, else bfloat16.

    bfloat16 has float32's range, so that it needs no loss scaling. On a GPU that has no bfloat16 (before Ampere), half
    precision is float16.
    """
    if section.dtype != "auto":
        return DTYPES[section.dtype]
    stored = config.get_text_config().dtype or config.dtype or torch.float32
    if stored == torch.float32:
        return torch.float32
    no_bfloat16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if no_bfloat16 else torch.bfloat16


def load_model(section: ModelSection, device: torch.device, *, quantise: bool = True) -> PreTrainedModel:
    """The base model on `device`, in its compute dtype, 4- or 8-bit if the recipe says so and `quantise` is left on."""
    config = checked_config(section)
    dtype = compute_dtype(section, config, device)
    arguments: dict[str, Any] = {}
    if section.attn_implementation != "auto":
        arguments["attn_implementation"] = section.attn_implementation
    if quantise and (section.load_in_4bit or section.load_in_8bit):
        arguments["quantization_config"] = quantisation(section, dtype)
    with _explained(section):
        _check_weight_files(section, config)
        model, info = AutoModelForCausalLM.from_pretrained(
            section.name_or_path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            device_map={"": device},
            output_loading_info=True,
            **arguments,
        )
    _check_weights(section.name_or_path, model, info)
    model.config.use_cache = False
    return model.train()


def _check_weights(name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise ModelError where weights are missing, which would be made up at random without a word, or not finite."""
    if absent := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise ModelError(
            f"the weights of {name} lack {len(absent)} tensors or have them in other shapes: {', '.join(absent[:3])}",
            "download or copy them again; config.json and weights must belong together",
        )
    if broken := [weight_name for weight_name, weight in model.named_parameters() if not _is_finite(weight)]:
        raise ModelError(
            f"weights of {name} hold NaN or infinities in {str(model.dtype)[6:]}: {', '.join(broken[:3])}"
            f"{f', and {len(broken) - 3} more' if len(broken) > 3 else ''}",
            "the model is broken, or model.dtype too narrow for it: take another copy, or another dtype",
        )


def _is_finite(weight: Tensor) -> bool:
    """Whether every number of a weight is finite; packed 4- and 8-bit numbers are, and those not in memory pass."""
    if not weight.is_floating_point() or weight.is_meta or not weight.numel():
        return True
    return bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all())


def _check_weight_files(section: ModelSection, config: PreTrainedConfig) -> None:
    """Raise ModelError where transformers would take weights from anything but the repository's own safetensors.

    A configuration may name another file, an index other shards, an adapter beside the model another base.
    """

    def own(filename: str) -> Path | None:
        found = cached_file(
            section.name_or_path,
            filename,
            revision=section.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found) if found else None

    name = section.name_or_path
    if own("adapter_config.json"):
        raise ModelError(
            f"{name} is an adapter, or holds one beside the model",
            "name the base in model.name_or_path, and the adapter in lora.adapter",
        )
    if named := getattr(config, "transformers_weights", None):
        raise ModelError(f"config.json of {name} names another file for the weights: {named}", "remove the key")
    if index := own("model.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for shard in sorted(map(str, shards)):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ModelError(f"{index.name} of {name} names {shard}", "shards are safetensors files beside it")


def classifier_section(name: str) -> ModelSection:
    """How to load a sequence classifier of one logit, a reward model say. Raises ModelError for what is no such model.

    Reads its configuration alone.
    """
    section = ModelSection(name_or_path=name)
    config = load_config(section)
    kinds = config.architectures or []
    if config.num_labels != 1 or not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ModelError(
            f"{name} is no reward model: {', '.join(kinds) or 'a model of no known kind'}, {config.num_labels} labels",
            "name a sequence classifier (...ForSequenceClassification) with one label",
        )
    return section


def load_classifier(section: ModelSection, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier and its tokenizer, for inference; on a CPU in float32, else in its own dtype."""
    tokenizer, config = load_tokenizer(section), load_config(section)
    dtype = torch.float32 if device.type == "cpu" else compute_dtype(section, config, device)
    with _explained(section):
        _check_weight_files(section, config)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            section.name_or_path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            device_map={"": device},
            output_loading_info=True,
        )
    _check_weights(section.name_or_path, model, info)
    return model.eval().requires_grad_(False), tokenizer


def quantisation(section: ModelSection, dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314), or LLM.int8 (arXiv 2208.07339)."""
    if section.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def disable_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout probability of the base's configuration to 0, those of nested configurations too."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            disable_dropout(value)
        elif isinstance(value, float) and ("drop" in name):
            setattr(config, name, 0.0)


@contextmanager
def _explained(section: ModelSection) -> Iterator[None]:
    """Turn what the libraries raise for a missing, gated or unusable model into an error with a hint."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from safetensors import SafetensorError

    name = section.name_or_path
    local = Path(name).exists()
    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated", f"ask for access at https://huggingface.co/{name}, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {section.revision!r}", "see model.revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model {name} on the hub", "check the name; a private model needs HF_TOKEN"
        ) from error
    except SafetensorError as error:
        raise ModelError(f"the weights of {name} are damaged: {error}", "download or copy them again") from error
    except OrpoError:
        raise
    except Exception as error:  # what a damaged file leads to is of any kind
        if is_out_of_memory(error):
            raise
        raise _explanation(name, local, error) from error


def _explanation(name: str, local: bool, error: Exception) -> ModelError:
    text = " ".join((str(error) if not isinstance(error, KeyError) else f"{error} is missing").split())
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 8:
        chain.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    if "GatedRepoError" in chain or "gated repo" in text:
        return ModelError(f"{name} is gated", f"ask for access at https://huggingface.co/{name}, then set HF_TOKEN")
    if "trust_remote_code" in text:
        return ModelError(
            f"{name} needs code from its own repository",
            "read that code; if you trust it, set model.trust_remote_code: true",
        )
    if local and not (Path(name) / "config.json").exists():
        return ModelError(f"{name} is no model: it has no config.json", "a model is a hub id or a directory")
    if "safetensors" in text and ("does not appear to have" in text or "no file named" in text):
        return ModelError(
            f"{name} has no weights in safetensors format",
            "orpo loads no pickled weights; convert them to safetensors",
        )
    if local:
        return ModelError(f"{name} cannot be loaded: {text[:400]}", "copy or download damaged files again")
    if "/" not in name or is_path(name):
        return ModelError(f"there is no directory {name}", "a model is a hub id or a directory")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "ON", "YES"):
        return ModelError(
            f"{name} is not in the local cache and HF_HUB_OFFLINE is set", "unset it, or name a directory"
        )
    if "not a valid model identifier" in text:
        return ModelError(f"there is no model {name} on the hub", "check the name; a private model needs HF_TOKEN")
    return ModelError(
        f"{name} cannot be loaded from the hub: {text[:400]}",
        "check the name and the network; a private or gated model needs HF_TOKEN",
    )


def is_path(name: str) -> bool:
    """Whether a model's name can be no hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
