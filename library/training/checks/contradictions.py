"""Options that do not go together, or are missing: each with its cure."""

from __future__ import annotations

from library.training.options import LossOptions, TrainNetworkOptions


def contradictions(options: TrainNetworkOptions) -> list[str]:
    """What is missing or does not fit together, each with its cure."""
    model, data, network = options.model, options.data, options.network
    optimizer, loss, output, previews, logs = options.optimizer, options.loss, options.output, options.previews, options.logs
    checks = [
        (options.hub.resume_from_huggingface and not options.state.resume,
         "--resume_from_huggingface needs --resume user/repo/folder"),
        (options.hub.save_state_to_huggingface and not options.hub.huggingface_repo_id,
         "--save_state_to_huggingface needs --huggingface_repo_id"),
        (not model.pretrained_model_name_or_path, "--pretrained_model_name_or_path is missing: give the model to train on"),
        (data.in_json and not data.dataset_config and bool(data.reg_data_dir),
         "--reg_data_dir has no place beside --in_json; put both into a --dataset_config, as two [[datasets]]"),
        (data.conditioning_data_dir and (data.dataset_config or data.in_json),
         "--conditioning_data_dir goes with --train_data_dir; in a dataset file write conditioning_data_dir into the subset"),
        (data.conditioning_data_dir and not loss.masked_loss,
         "--conditioning_data_dir holds masks for --masked_loss, which is not given; ControlNets are not trained here"),
        (not network.network_module, "--network_module is missing: give --network_module=networks.lora"),
        (not output.output_dir, "--output_dir is missing: give a folder for the LoRA"),
        (network.network_train_unet_only and network.network_train_text_encoder_only,
         "--network_train_unet_only and --network_train_text_encoder_only exclude each other"),
        (network.dim_from_weights and not network.network_weights, "--dim_from_weights needs --network_weights"),
        (len(network.base_weights_multiplier or []) > len(network.base_weights or []),
         "--base_weights_multiplier has more numbers than --base_weights has files"),
        ((optimizer.use_8bit_adam or optimizer.use_lion_optimizer) and optimizer.optimizer_type,
         "--use_8bit_adam and --use_lion_optimizer cannot stand beside --optimizer_type"),
        (optimizer.use_8bit_adam and optimizer.use_lion_optimizer, "--use_8bit_adam and --use_lion_optimizer exclude each other"),
        *loss_contradictions(loss, model.v_parameterization),
        *((getattr(options.precision, name) and options.training.mixed_precision != kind,
           f"--{name} needs --mixed_precision {kind}")
          for name, kind in (("full_fp16", "fp16"), ("full_bf16", "bf16"))),
        *((getattr(options.precision, name) and options.precision.base_dtype not in (None, "fp8"),
           f"--{name} and --base_dtype {options.precision.base_dtype} name two formats for the same weights; "
           "leave out one of them")
          for name in ("fp8_base", "fp8_base_unet")),
        (options.precision.torch_compile and options.precision.dynamo_backend == "no",
         "--dynamo_backend no switches off what --torch_compile asks for; take out one of them"),
        (previews.are_asked_for and not previews.sample_prompts,
         "--sample_every_n_epochs, --sample_every_n_steps and --sample_at_first need --sample_prompts"),
        (options.state.skip_until_initial_step
         and not (options.state.resume or options.state.initial_step or options.state.initial_epoch),
         "--skip_until_initial_step needs --initial_step, --initial_epoch or --resume"),
        (logs.log_with in ("tensorboard", "all") and not logs.logging_dir, f"--log_with {logs.log_with} needs --logging_dir"),
    ]  # fmt: skip
    return [message for wrong, message in checks if wrong]


def loss_contradictions(loss: LossOptions, v: bool) -> list[tuple[bool, str]]:
    """The same for noise and loss."""
    low, high = loss.min_timestep or 0, 1000 if loss.max_timestep is None else loss.max_timestep
    return [
        (loss.noise_offset_random_strength and not loss.noise_offset, "--noise_offset_random_strength needs --noise_offset"),
        (bool(loss.adaptive_noise_scale) and not loss.noise_offset, "--adaptive_noise_scale needs --noise_offset"),
        (loss.ip_noise_gamma_random_strength and not loss.ip_noise_gamma,
         "--ip_noise_gamma_random_strength needs --ip_noise_gamma"),
        (low >= high,
         f"--min_timestep {low} must be below --max_timestep {high}; for the one timestep {low} give --max_timestep {low + 1}"),
        (loss.scale_v_pred_loss_like_noise_pred and not v, "--scale_v_pred_loss_like_noise_pred needs --v_parameterization"),
        (bool(loss.v_pred_like_loss) and v,
         "--v_pred_like_loss is for models that predict noise; leave it out with --v_parameterization"),
        (loss.zero_terminal_snr and not v and (loss.debiased_estimation_loss or bool(loss.v_pred_like_loss)),
         "--zero_terminal_snr without --v_parameterization: the weights of --debiased_estimation_loss and --v_pred_like_loss are "
         "infinite where nothing but noise is left; leave out --zero_terminal_snr"),
    ]  # fmt: skip
