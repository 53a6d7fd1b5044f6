"""Options that people know from sd-scripts and that this trainer does not have, each with the reason.

Each is an error that names it: a run that ignored one would look fine and be wrong. Remove a line when the option is built.
"""

from library.command_line import UnsupportedOptions

_DEEPSPEED = "DeepSpeed is not supported; a LoRA run fits one card, see --gradient_checkpointing"

_REASONS: dict[str, str] = {
    # model
    "tokenizer_cache_dir": "the tokenizer is part of this suite and needs no cache",
    # data
    "cache_info": "sizes are read from image headers at every start, which is fast; captions are always read anew",
    "skip_cache_check": "the latent cache checks contents, which is fast; there is nothing to skip",
    "dataset_class": (
        "a run depends on images, seed and position alone here, which foreign code does not promise; use --dataset_config"
    ),
    # precision, memory and speed
    "cpu_offload_checkpointing": "it is for other kinds of models, such as FLUX; for a U-Net use --gradient_checkpointing",
    # processes
    **dict.fromkeys(
        ["ddp_gradient_as_bucket_view", "ddp_static_graph"],
        "gradients of several processes are added up in one go, without DDP",
    ),
    **dict.fromkeys(
        [
            "deepspeed", "zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device",
            "offload_param_nvme_path", "zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients",
        ],
        _DEEPSPEED,
    ),
    # keys of graphical front ends
    "model_train_type": "LoRAs are trained here, for the model that is given; front ends write sd-lora or sdxl-lora for that",
    "epoch": "front ends make --max_train_steps of it; give --max_train_epochs",
    "noise_offset_type": "front ends switch between --noise_offset and --multires_noise_iterations by it; give these",
}  # fmt: skip

# Values of theirs that ask for nothing: graphical front ends write them into every config file.
_HARMLESS = {
    "model_train_type": ("sd-lora", "sdxl-lora"), "zero_stage": (2,), "huggingface_repo_visibility": ("private",),
}  # fmt: skip

UNSUPPORTED = UnsupportedOptions(reasons=_REASONS, harmless=_HARMLESS, of_front_ends=frozenset({"epoch", "noise_offset_type"}))
