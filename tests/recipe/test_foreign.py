"""Other tools' names lead to keys that exist, and are not our own."""

from __future__ import annotations

import pytest

from orpo_cli.recipe import foreign
from orpo_cli.recipe.faults import annotation_at, section_keys
from orpo_cli.recipe.schema import FILTER_OPERATORS


def test_every_name_leads_to_a_key_of_the_schema() -> None:
    assert [key for key in foreign.OUR_KEY.values() if annotation_at(tuple(key.split("."))) is None] == []


def test_no_name_is_listed_twice_or_is_our_own() -> None:
    ours = {key.rpartition(".")[2] for key in section_keys()} - {"adapter"}  # means the method in axolotl
    assert foreign.OUR_KEY.keys() & foreign.NO_KEY.keys() == set()
    assert (foreign.OUR_KEY.keys() | foreign.NO_KEY.keys()) & ours == set()
    assert foreign.NOTES.keys() - foreign.OUR_KEY.keys() == set()
    assert foreign.OUR_KEY.keys() & set(section_keys()) == set()
    assert len(foreign.OUR_KEY) + len(foreign.NO_KEY) > 150


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("base_model", "model.name_or_path"),
        ("micro_batch_size", "train.batch_size"),
        ("per_device_train_batch_size", "train.batch_size"),
        ("gradient_accumulation_steps", "train.batch_size"),
        ("cutoff_len", "data.max_length"),
        ("sequence_len", "data.max_length"),
        ("pref_beta", "loss.beta"),
        ("orpo_alpha", "loss.beta"),
        ("lora_r", "lora.r"),
        ("lora_target", "lora.target_modules"),
        ("bf16", "model.dtype"),
        ("report_to", "output.trackers"),
        ("val_set_size", "data.eval.holdout"),
        ("--lr-scheduler", "train.lr_scheduler_type"),
    ],
)
def test_names_of_other_tools(name: str, key: str) -> None:
    found = foreign.translate(name)
    assert found is not None
    assert found[0] == key


def test_names_without_a_counterpart_say_why() -> None:
    assert foreign.translate("rl") == (None, "not needed: the method is always ORPO")
    assert foreign.translate("no_such_thing") is None


# What bears on an ORPO run in the recipes of each tool, by its documentation.
NAMES = {
    "axolotl": """
        base_model revision_of_model model_type tokenizer_type trust_remote_code rl orpo_alpha rl_beta datasets
        test_datasets val_set_size dataset_prepared_path chat_template chat_template_jinja sequence_len
        sample_packing eval_sample_packing pad_to_sequence_len excess_length_strategy adapter lora_model_dir
        lora_r lora_alpha lora_dropout lora_target_modules lora_target_linear lora_modules_to_save peft_use_dora
        peft_use_rslora peft_init_lora_weights load_in_8bit load_in_4bit bf16 fp16 tf32 bfloat16 float16
        gradient_accumulation_steps micro_batch_size eval_batch_size num_epochs max_steps warmup_steps
        warmup_ratio learning_rate lr_scheduler cosine_min_lr_ratio optimizer optim_args weight_decay adam_beta1
        adam_beta2 adam_epsilon max_grad_norm train_on_inputs group_by_length gradient_checkpointing
        gradient_checkpointing_kwargs flash_attention sdp_attention xformers_attention eager_attention
        eval_steps evals_per_epoch save_steps saves_per_epoch save_strategy save_total_limit logging_steps
        early_stopping_patience load_best_model_at_end metric_for_best_model resume_from_checkpoint
        auto_resume_from_checkpoints local_rank deepspeed fsdp fsdp_config special_tokens tokens output_dir
        hub_model_id hub_strategy push_to_hub wandb_project wandb_entity wandb_name wandb_run_id wandb_log_model
        mlflow_tracking_uri comet_project_name seed remove_unused_columns shuffle_merged_datasets
        dataset_processes dataloader_num_workers dataloader_pin_memory neftune_noise_alpha torch_compile plugins
        liger_rope cut_cross_entropy unsloth_lora_mlp eval_table_size loraplus_lr_ratio ddp_timeout
    """,
    "LLaMA-Factory": """
        model_name_or_path model_revision adapter_name_or_path quantization_bit quantization_method
        double_quantization flash_attn enable_liger_kernel use_unsloth rope_scaling upcast_layernorm
        resize_vocab add_tokens new_special_tokens trust_remote_code stage do_train pref_loss pref_beta pref_ftx
        ref_model dpo_label_smoothing simpo_gamma finetuning_type lora_rank lora_alpha lora_dropout lora_target
        additional_target use_rslora use_dora pissa_init loraplus_lr_ratio create_new_adapter use_galore
        galore_rank use_badam badam_mode freeze_trainable_layers dataset eval_dataset dataset_dir template
        cutoff_len train_on_prompt mask_history max_samples streaming buffer_size mix_strategy interleave_probs
        overwrite_cache preprocessing_num_workers tokenized_path default_system enable_thinking val_size packing
        neat_packing output_dir overwrite_output_dir plot_loss report_to per_device_train_batch_size
        gradient_accumulation_steps learning_rate num_train_epochs max_steps lr_scheduler_type
        lr_scheduler_kwargs warmup_ratio warmup_steps bf16 fp16 pure_bf16 optim max_grad_norm weight_decay
        ddp_timeout deepspeed disable_gradient_checkpointing per_device_eval_batch_size eval_strategy eval_steps
        save_steps save_strategy save_total_limit save_only_model load_best_model_at_end early_stopping_steps
        include_num_input_tokens_seen disable_shuffling use_swanlab swanlab_project seed
    """,
    "TRL": """
        model_name_or_path model_revision dtype torch_dtype attn_implementation trust_remote_code
        model_init_kwargs use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters
        lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type
        use_bnb_nested_quant dataset_name dataset_config dataset_train_split dataset_test_split
        dataset_streaming datasets test_split_size beta max_length max_prompt_length max_completion_length
        truncation_mode label_pad_token_id padding_value disable_dropout generate_during_eval is_encoder_decoder
        dataset_num_proc learning_rate num_train_epochs max_steps per_device_train_batch_size
        per_device_eval_batch_size gradient_accumulation_steps gradient_checkpointing
        activation_checkpointing_kwargs optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
        max_grad_norm lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio bf16 fp16 tf32
        logging_steps logging_strategy logging_first_step eval_strategy eval_steps eval_on_start eval_delay
        eval_accumulation_steps prediction_loss_only save_strategy save_steps save_total_limit save_only_model
        seed data_seed full_determinism report_to run_name project output_dir push_to_hub hub_model_id
        hub_private_repo load_best_model_at_end metric_for_best_model greater_is_better label_smoothing_factor
        neftune_noise_alpha use_liger_kernel torch_compile auto_find_batch_size use_cpu deepspeed fsdp
        remove_unused_columns train_sampling_strategy average_tokens_across_devices dataloader_num_workers
        resume_from_checkpoint
    """,
    "alignment-handbook": """
        model_name_or_path model_revision torch_dtype use_flash_attention_2 chat_template tokenizer_name_or_path
        dataset_mixer dataset_mixture dataset_splits dataset_configs text_column preprocessing_num_workers
        truncation_side auto_insert_empty_system_msg bf16 beta do_eval evaluation_strategy eval_steps
        gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs hub_model_id
        learning_rate log_level logging_steps lr_scheduler_type max_length max_prompt_length num_train_epochs
        optim output_dir per_device_train_batch_size per_device_eval_batch_size push_to_hub report_to
        save_strategy save_total_limit seed warmup_ratio warmup_steps use_peft load_in_4bit lora_r lora_alpha
        lora_dropout lora_target_modules system_prompt
    """,
}


@pytest.mark.parametrize("tool", NAMES)
def test_every_name_of_a_tool_is_ours_or_explained(tool: str) -> None:
    ours = {key.rpartition(".")[2] for key in section_keys()}
    assert [name for name in NAMES[tool].split() if name not in ours and foreign.translate(name) is None] == []


def test_families_of_names_say_why() -> None:
    assert foreign.translate("galore_rank") == (None, "there is none: AdamW, and LoRA or a full fine-tune")
    assert foreign.translate("fsdp_config") == (None, foreign.NO_KEY["fsdp_config"])  # a name of its own wins
    assert foreign.translate("mlflow_run_name") == (None, "a tracker's own: set MLFLOW_* in the environment")
    assert foreign.translate("wandb_project") == ("output.trackers", foreign.NOTES["wandb_project"])


def test_words_for_operators_lead_to_operators() -> None:
    assert set(foreign.OPERATORS.values()) <= set(FILTER_OPERATORS)
    assert foreign.OPERATORS.keys() & set(FILTER_OPERATORS) == set()
