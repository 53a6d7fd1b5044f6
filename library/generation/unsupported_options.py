"""Options that people know from sd-scripts and that this script does not have, each with the reason.

Each is an error that names it: a run that ignored one would look fine and be wrong. Remove a line when the option is built.
"""

from library.command_line import UnsupportedOptions

_CONTROL_NET = "ControlNet is not built; use the A1111 web UI or Diffusers for it, which read the same LoRA files"
_GUIDANCE = "guidance by CLIP or VGG16 is not built; say it in the prompt, or start from an image with --image_path"
_GRADUAL_LATENT = "gradual latent is not built; for large images use --highres_fix_scale or --ds_depth_1"

_REASONS: dict[str, str] = {
    **dict.fromkeys(["console_log_level", "console_log_file", "console_log_simple"], "redirect the output in the shell instead"),
    "tokenizer_cache_dir": "the tokenizer is part of this suite and needs no cache",
    "XTI_embeddings": "extended embeddings are not built; use --textual_inversion_embeddings",
    **dict.fromkeys(
        ["clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale", "vgg16_guidance_layer", "guide_image_path"],
        _GUIDANCE,
    ),
    **dict.fromkeys(
        [
            "highres_fix_disable_control_net", "control_net_models", "control_net_preps", "control_net_weights",
            "control_net_ratios",
        ],
        _CONTROL_NET,
    ),
    **dict.fromkeys(["control_net_lllite_models", "control_net_multipliers"], _CONTROL_NET),
    "clip_vision_strength": "the text vector is not replaced by that of an image; start from an image with --image_path",
    **dict.fromkeys(
        ["pyramid_noise_prob", "pyramid_noise_discount_range", "noise_offset_prob", "noise_offset_range"],
        "the noise that an image begins from is not shaped; train with a noise offset or zero terminal SNR",
    ),
    **dict.fromkeys(
        ["from_module", "prompter_module_args"], "prompts are not made by a module; print them and give --from_file=- (a pipe)"
    ),
    "emb_normalize_mode": "weighted prompts are rescaled as the family of the model needs it",
    "force_scheduler_zero_steps_offset": "timesteps are those of the model's own scheduler (scheduler_config.json of a folder)",
    "v1": "the family is read from the model; leave it out",
    **dict.fromkeys(
        [
            "gradual_latent_timesteps", "gradual_latent_ratio", "gradual_latent_ratio_step", "gradual_latent_every_n_steps",
            "gradual_latent_s_noise", "gradual_latent_unsharp_params",
        ],
        _GRADUAL_LATENT,
    ),
}  # fmt: skip

UNSUPPORTED = UnsupportedOptions(reasons=_REASONS)

# In-line options of prompts that are not built, with the reason.
UNSUPPORTED_INLINE: dict[str, str] = {
    "c": _GUIDANCE,
    **dict.fromkeys(["glt", "glr", "gle", "gls", "glsn", "glus"], _GRADUAL_LATENT),
}
