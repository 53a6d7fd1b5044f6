"""Every option of train_network.py, in typed groups. Names, defaults and meanings are those people know from sd-scripts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from library.command_line import OptionGroup, groups_of, parse
from library.diffusion.samplers import SAMPLERS
from library.training.refused_options import REFUSED

Samplers = Literal[tuple(SAMPLERS)]  # type: ignore[valid-type]


def _as_words(value: Any) -> Any:
    """`[512, 768]` or `512` of a config file as the command line writes it; library.data.config reads it."""
    if isinstance(value, (list, tuple)):
        return ",".join(str(part) for part in value)
    return str(value)


def _first_rate(value: Any) -> Any:
    """SD 1.x and 2.x have one text encoder: of a list of rates the first is used."""
    return (value[0] if value else None) if isinstance(value, list) else value


def _chunk_lengths(value: Any) -> Any:
    """Digits as a number, since the command line gives text; 75 is the same as nothing."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    return None if number == 75 else number


def steps_or_share(text: Any) -> int | float:
    """`100` (steps), `0.1` or `10%` (share of all steps, as a float below 1)."""
    words = str(text).strip()
    try:
        number = float(words[:-1]) / 100 if words.endswith("%") else float(words)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e12 or (number > 1 and number != int(number)) or (words.endswith("%") and number > 1):
        raise ValueError(f"expected a number of steps (100), a share below 1 (0.1) or a percentage (10%), got {text!r}")
    return number if words.endswith("%") or 0 < number < 1 else int(number)


Words = Annotated[str | None, BeforeValidator(_as_words)]
StepsOrShare = Annotated[int | float, BeforeValidator(steps_or_share)]
Count = Annotated[int, Field(ge=1)]
CountOrOff = Annotated[
    Count | None, BeforeValidator(lambda value: None if value in (0, "0") else value)
]  # 0 as front ends write it


class ModelOptions(OptionGroup):
    """Model"""

    pretrained_model_name_or_path: str | None = Field(
        None, description="checkpoint (.safetensors, .ckpt), Diffusers folder or hub id"
    )
    v2: bool = Field(False, description="the model is Stable Diffusion 2.x")
    v_parameterization: bool = Field(False, description="the model predicts velocity (SD 2.x 768)")
    vae: str | None = Field(None, description="another VAE: checkpoint, Diffusers folder or hub id")
    no_half_vae: bool = Field(False, description="keep the VAE in float32 (cures black pictures and NaN latents)")
    clip_skip: Count | None = Field(None, description="use the text encoder's Nth layer from the end")
    xformers: bool = Field(False, description="attention by xformers, if it is installed and there is a GPU")
    mem_eff_attn: bool = Field(False, description="attention that needs little memory: torch's, also where xformers is asked for")
    sdpa: bool = Field(False, description="attention by torch (this is the default)")


class DataOptions(OptionGroup):
    """Pictures"""

    dataset_config: str | None = Field(None, description="TOML or JSON file that describes the datasets")
    train_data_dir: str | None = Field(None, description="folder of pictures, or of folders named <repeats>_<class>")
    in_json: str | None = Field(
        None, description="metadata file (.json, .jsonl) that lists pictures below train_data_dir with their captions"
    )
    conditioning_data_dir: str | None = Field(None, description="folder of masks for masked_loss, arranged like train_data_dir")
    reg_data_dir: str | None = Field(None, description="folder of regularisation folders, named likewise")
    dataset_repeats: Count = Field(1, description="repeats of every picture where nothing else is said")
    train_batch_size: Count = Field(1, description="pictures a step")
    resolution: Words = Field(None, description="training size: 512 or width,height")
    enable_bucket: bool = Field(False, description="group pictures by aspect ratio")
    min_bucket_reso: int = Field(256, description="smallest bucket side")
    max_bucket_reso: int = Field(1024, description="largest bucket side")
    bucket_reso_steps: int = Field(64, description="bucket sides are multiples of this")
    bucket_no_upscale: bool = Field(False, description="never enlarge a picture")
    resize_interpolation: Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"] | None = Field(
        None, description="resizing filter; unset: area to shrink, lanczos to enlarge"
    )
    on_bad_image: Literal["refuse", "skip"] = Field(
        "refuse", description="what an unreadable picture does: end the run, or be named and skipped"
    )
    alpha_mask: bool = Field(False, description="a picture's alpha channel says how much of it counts")
    prior_loss_weight: float = Field(1.0, ge=0, description="weight of the loss on regularisation pictures")
    debug_dataset: bool = Field(False, description="show what the trainer would see, and stop")


class CaptionOptions(OptionGroup):
    """Captions"""

    caption_extension: str = Field(".caption", description="suffix of caption files")
    caption_extention: str | None = Field(None, description="old spelling of caption_extension")
    shuffle_caption: bool = Field(False, description="shuffle the pieces of a caption at each use")
    caption_separator: str = Field(",", description="what separates the pieces")
    keep_tokens: int = Field(0, ge=0, description="pieces at the front that stay")
    keep_tokens_separator: str = Field("", description="mark in a caption: what stands before it stays")
    secondary_separator: str | None = Field(None, description="holds pieces together; becomes caption_separator in the end")
    enable_wildcard: bool = Field(False, description="{a|b} alternatives, and one of several caption lines")
    caption_prefix: str | None = Field(None, description="text before every caption")
    caption_suffix: str | None = Field(None, description="text after every caption")
    caption_dropout_rate: float = Field(0.0, ge=0, le=1, description="chance that a caption is empty")
    caption_dropout_every_n_epochs: int = Field(0, ge=0, description="all captions are empty in every Nth epoch")
    caption_tag_dropout_rate: float = Field(0.0, ge=0, le=1, description="chance that a piece is left out")
    token_warmup_min: int = Field(1, ge=0, description="pieces at the first step of token_warmup_step")
    token_warmup_step: float = Field(0, ge=0, description="steps (below 1: share of all) until all pieces are used")
    max_token_length: Annotated[Literal[150, 225] | None, BeforeValidator(_chunk_lengths)] = Field(
        None, description="tokens of a caption; unset: 75"
    )
    weighted_captions: bool = Field(False, description="read (word:1.2) as a weight")


class AugmentationOptions(OptionGroup):
    """Augmentation and latent cache"""

    flip_aug: bool = Field(False, description="mirror half of the pictures")
    color_aug: bool = Field(False, description="change hue or gamma a little")
    random_crop: bool = Field(False, description="crop at a random place")
    face_crop_aug_range: Words = Field(None, description="low,high: crop around the face given in the file name")
    cache_latents: bool = Field(False, description="encode every picture once, before training")
    cache_latents_to_disk: bool = Field(False, description="keep the encoded pictures on disk too")
    vae_batch_size: Count = Field(1, description="pictures encoded at once")
    max_data_loader_n_workers: int = Field(8, ge=0, description="most processes that prepare batches")
    persistent_data_loader_workers: bool = Field(False, description="keep those processes between epochs")


class NetworkOptions(OptionGroup):
    """Network"""

    network_module: str | None = Field(None, description="Python module of the network: networks.lora")
    network_dim: Count | None = Field(None, description="rank; unset: 4")
    network_alpha: float = Field(1.0, ge=0, description="the network's output is scaled by alpha / rank; 0: alpha = rank")
    network_dropout: float | None = Field(None, ge=0, lt=1, description="dropout between the two layers of each LoRA")
    network_args: list[str] | None = Field(None, description="key=value words for the network module")
    network_weights: str | None = Field(None, description="start from this LoRA file")
    dim_from_weights: bool = Field(False, description="take rank and alpha of each module from network_weights")
    network_train_unet_only: bool = Field(False, description="LoRA for the U-Net only")
    network_train_text_encoder_only: bool = Field(False, description="LoRA for the text encoder only")
    base_weights: list[str] | None = Field(None, description="LoRA files merged into the model before training")
    base_weights_multiplier: list[float] | None = Field(None, description="strengths of base_weights; a missing one is 1")
    scale_weight_norms: float | None = Field(None, ge=0, description="largest norm of a LoRA module's weight; 0: off")


class OptimizerOptions(OptionGroup):
    """Optimizer and learning rate"""

    optimizer_type: str = Field("", description="AdamW (default), AdamW8bit, Lion, SGDNesterov, ... or package.Class")
    use_8bit_adam: bool = Field(False, description="old spelling of optimizer_type=AdamW8bit")
    use_lion_optimizer: bool = Field(False, description="old spelling of optimizer_type=Lion")
    optimizer_args: list[str] | None = Field(None, description="key=value words for the optimizer")
    learning_rate: float = Field(2e-6, ge=0, description="learning rate; 1e-4 is usual for a LoRA")
    unet_lr: float | None = Field(None, ge=0, description="learning rate of the U-Net's LoRA; unset: learning_rate")
    text_encoder_lr: Annotated[float | None, BeforeValidator(_first_rate)] = Field(
        None, ge=0, description="learning rate of the text encoder's LoRA; unset: learning_rate"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0: off")
    fused_backward_pass: bool = Field(
        False, description="change each weight as soon as its gradient is there: memory for one gradient only"
    )
    lr_scheduler: str = Field(
        "constant", description="constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, ..."
    )
    lr_warmup_steps: StepsOrShare = Field(0, description="steps, share (0.1) or percentage (10%) of rising learning rate")
    lr_decay_steps: StepsOrShare = Field(0, description="steps or share of falling rate (warmup_stable_decay)")
    lr_scheduler_num_cycles: Count = Field(1, description="cycles of cosine_with_restarts")
    lr_scheduler_power: float = Field(1.0, description="power of polynomial")
    lr_scheduler_timescale: Count | None = Field(None, description="time scale of inverse_sqrt; unset: warm-up steps")
    lr_scheduler_min_lr_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="lowest rate of cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, as a share",
    )
    lr_scheduler_type: str = Field("", description="any class of torch.optim.lr_scheduler, or package.Class")
    lr_scheduler_args: list[str] | None = Field(None, description="key=value words for it")


class TrainingOptions(OptionGroup):
    """Training"""

    max_train_steps: Count = Field(1600, description="optimizer steps")
    max_train_epochs: CountOrOff = Field(None, description="passes over the data; beats max_train_steps")
    gradient_accumulation_steps: Count = Field(1, description="batches an optimizer step")
    ddp_timeout: Count | None = Field(None, description="minutes that a process waits for the others; unset: 180")
    gradient_checkpointing: bool = Field(False, description="save memory by computing activations twice")
    gradient_checkpointing_budget: float | None = Field(
        None, gt=0, description="GiB that the run may use: only what is above them is computed twice; unset: all"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="number format of the frozen model and of the arithmetic"
    )
    seed: int | None = Field(None, description="seed of everything random; unset: a new one, which is recorded")
    on_nonfinite_loss: Literal["stop", "skip"] = Field(
        "stop", description="what a loss of NaN or infinity does: end the run, or skip the batch (which waits for each loss)"
    )


class LossOptions(OptionGroup):
    """Noise and loss"""

    noise_offset: float | None = Field(
        None, ge=0, description="strength of a random shift of each channel of the noise; 0.05 is usual"
    )
    noise_offset_random_strength: bool = Field(
        False, description="draw that strength anew for each batch, between 0 and noise_offset"
    )
    adaptive_noise_scale: float | None = Field(
        None, description="adds this times the mean brightness of each latent channel to noise_offset"
    )
    multires_noise_iterations: int | None = Field(
        None, ge=0, le=16, description="levels of coarser noise that are added; 6 to 10 is usual"
    )
    multires_noise_discount: float = Field(0.3, gt=0, description="each coarser level counts this many times the one before")
    ip_noise_gamma: float | None = Field(
        None, ge=0, description="input perturbation: noise that the target does not know of; 0.1 is usual"
    )
    ip_noise_gamma_random_strength: bool = Field(
        False, description="draw that strength anew for each batch, between 0 and ip_noise_gamma"
    )
    zero_terminal_snr: bool = Field(False, description="noise schedule that ends in pure noise; for models that predict velocity")
    min_timestep: int | None = Field(None, ge=0, le=999, description="lowest timestep that is trained; unset: 0")
    max_timestep: int | None = Field(None, ge=1, le=1000, description="timesteps below this are trained; unset: 1000")
    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = Field("l2", description="how an error counts")
    huber_schedule: Literal["constant", "exponential", "snr"] = Field(
        "snr", description="how the width of huber and smooth_l1 depends on the timestep"
    )
    huber_c: float = Field(0.1, gt=0, description="width of huber and smooth_l1: errors beyond it count linearly")
    huber_scale: float = Field(1.0, gt=0, description="factor of that width")
    masked_loss: bool = Field(False, description="masks of conditioning_data_dir say which parts of a picture count")
    min_snr_gamma: float | None = Field(None, ge=0, description="Min-SNR loss weighting; 5 is usual")
    debiased_estimation_loss: bool = Field(False, description="loss weighting by one over the root of the signal-to-noise ratio")
    scale_v_pred_loss_like_noise_pred: bool = Field(
        False, description="weigh the loss of a velocity model as that of a noise model"
    )
    v_pred_like_loss: float | None = Field(
        None, ge=0, description="share of a velocity-like loss that is added for a noise model"
    )


class PrecisionOptions(OptionGroup):
    """Precision and memory"""

    full_fp16: bool = Field(False, description="the network's own weights in fp16 too (with mixed_precision=fp16)")
    full_bf16: bool = Field(False, description="the network's own weights in bf16 too (with mixed_precision=bf16)")
    base_dtype: Literal["int8", "fp8", "nf4"] | None = Field(
        None, description="format in which the frozen U-Net and text encoder are kept; they are unpacked layer by layer"
    )
    fp8_base: bool = Field(False, description="the same as base_dtype=fp8")
    fp8_base_unet: bool = Field(False, description="the same for the U-Net alone")
    lowram: bool = Field(False, description="main memory is short: nothing is moved there from the GPU")
    highvram: bool = Field(
        False, description="GPU memory is plentiful: VAE and text encoder stay there, and its cache is not emptied"
    )
    torch_compile: bool = Field(False, description="compile the model with torch.compile; the first steps take minutes")
    dynamo_backend: str = Field("inductor", description="back end of torch_compile")


class ValidationOptions(OptionGroup):
    """Validation, early stopping, averaged weights"""

    validation_split: float = Field(0.0, ge=0, lt=1, description="share of the pictures that is held out and validated with")
    validation_seed: int | None = Field(
        None, description="seed of what is held out and of the noise it is measured with; unset: seed"
    )
    validate_every_n_steps: CountOrOff = Field(None, description="validate after every Nth step")
    validate_every_n_epochs: CountOrOff = Field(None, description="validate after every Nth epoch; unset: every epoch")
    max_validation_steps: CountOrOff = Field(None, description="most batches of one validation")
    early_stopping_patience: CountOrOff = Field(None, description="end the run after so many validations without a better one")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="average the weights over the steps, and use the average; 0.99 to 0.9999"
    )


class StateOptions(OptionGroup):
    """Saving and resuming the state"""

    save_state: bool = Field(False, description="save the state of the run with every file, and at the end")
    save_state_on_train_end: bool = Field(False, description="save it at the end only")
    save_last_n_epochs_state: int | None = Field(
        None, ge=0, description="keep only this many epoch states; unset: save_last_n_epochs"
    )
    save_last_n_steps_state: int | None = Field(
        None, ge=0, description="remove step states older than this; unset: save_last_n_steps"
    )
    resume: str | None = Field(None, description="state folder to go on from, or the folder that holds them")
    initial_epoch: Count | None = Field(None, description="epoch to begin with, from 1")
    initial_step: int | None = Field(None, ge=0, description="step to begin after; beats initial_epoch")
    skip_until_initial_step: bool = Field(False, description="leave out the data before it; else its epoch begins anew")


class OutputOptions(OptionGroup):
    """Output"""

    output_dir: str | None = Field(None, description="folder for everything that is written")
    output_name: str | None = Field(None, description="file name of the LoRA, without suffix")
    save_model_as: Literal["safetensors", "ckpt", "pt"] = Field("safetensors", description="file format")
    save_precision: Literal["float", "fp16", "bf16"] | None = Field(
        None, description="number format in the file; unset: as trained"
    )
    save_every_n_epochs: CountOrOff = Field(None, description="save after every Nth epoch")
    save_every_n_steps: CountOrOff = Field(None, description="save after every Nth step")
    save_n_epoch_ratio: CountOrOff = Field(None, description="save about this many times; sets save_every_n_epochs")
    save_last_n_epochs: CountOrOff = Field(None, description="keep only this many epoch files")
    save_last_n_steps: CountOrOff = Field(None, description="remove step files that are older than this many steps")


class MetadataOptions(OptionGroup):
    """What is written into the file about it"""

    no_metadata: bool = Field(False, description="write only what loaders need into the file's metadata")
    training_comment: str | None = Field(None, description="text for the file's metadata")
    metadata_title: str | None = Field(None, description="title; unset: output_name")
    metadata_author: str | None = Field(None, description="who made it")
    metadata_description: str | None = Field(None, description="what it is")
    metadata_license: str | None = Field(None, description="licence of the file")
    metadata_tags: str | None = Field(None, description="tags, with commas between them")
    metadata_usage_hint: str | None = Field(None, description="how to use it")
    metadata_trigger_phrase: str | None = Field(None, description="the words that call it up in a prompt")
    metadata_thumbnail: str | None = Field(None, description="a picture for lists: a file, or a data: text")
    metadata_merged_from: str | None = Field(None, description="what it was merged from")
    metadata_preprocessor: str | None = Field(None, description="preprocessor that pictures need")
    metadata_is_negative_embedding: str | None = Field(None, description="whether it is meant for the negative prompt")
    from_metadata: str | None = Field(None, description="print the command and dataset file that made this LoRA file, and stop")


class HubOptions(OptionGroup):
    """Hugging Face hub"""

    huggingface_repo_id: str | None = Field(
        None, description="repository for copies of all saved files: user/name; made if it does not exist"
    )
    huggingface_repo_type: Literal["model", "dataset", "space"] | None = Field(
        None, description="kind of that repository; unset: model"
    )
    huggingface_path_in_repo: str | None = Field(None, description="folder in it; unset: none")
    huggingface_token: str | None = Field(None, description="access token; unset: that of `hf auth login`")
    huggingface_repo_visibility: Literal["public", "private"] | None = Field(
        None, description="for a repository that is made; unset: private"
    )
    async_upload: bool = Field(False, description="upload in the background, except the last file")
    save_state_to_huggingface: bool = Field(False, description="upload saved states too")
    resume_from_huggingface: bool = Field(
        False, description="resume names a state on the hub: user/repo/folder, or with :revision:type behind it"
    )


class PreviewOptions(OptionGroup):
    """Sample pictures while training"""

    sample_prompts: str | None = Field(None, description="file of prompts (.txt, .toml, .json)")
    sample_every_n_epochs: int | None = Field(None, description="sample after every Nth epoch; 0: off")
    sample_every_n_steps: int | None = Field(None, description="sample after every Nth step; 0: off")
    sample_at_first: bool = Field(False, description="also sample before the first step")
    sample_sampler: Samplers = Field("ddim", description="sampler")


class LogOptions(OptionGroup):
    """Logs and config file"""

    logging_dir: str | None = Field(None, description="folder for TensorBoard logs")
    log_with: Literal["tensorboard", "wandb", "all"] | None = Field(
        None, description="tracker; unset: TensorBoard if logging_dir is given"
    )
    log_prefix: str | None = Field(None, description="text before the time in the log folder's name")
    log_tracker_name: str | None = Field(
        None, description="name of the run's folder, and of the wandb project; unset: network_train"
    )
    wandb_run_name: str | None = Field(None, description="name of the run on wandb; unset: wandb makes one up")
    wandb_api_key: str | None = Field(None, description="key for wandb; unset: that of `wandb login`")
    log_tracker_config: str | None = Field(
        None, description="TOML file with tables [tensorboard] and [wandb]: arguments for their start"
    )
    log_config: bool = Field(False, description="record the options with the logs, without paths and secrets")
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = Field(
        None, description="show messages from this level on; unset: INFO"
    )
    console_log_file: str | None = Field(None, description="write messages into this file instead of the console")
    console_log_simple: bool = Field(False, description="plain lines without colours and columns")
    output_config: bool = Field(False, description="write the options into config_file, and stop")
    config_file: str | None = Field(None, description="TOML file with any of these options; the command line wins")


class TrainNetworkOptions(BaseModel):
    """All options of train_network.py."""

    model: ModelOptions
    data: DataOptions
    captions: CaptionOptions
    augmentation: AugmentationOptions
    network: NetworkOptions
    optimizer: OptimizerOptions
    training: TrainingOptions
    loss: LossOptions
    precision: PrecisionOptions
    validation: ValidationOptions
    state: StateOptions
    output: OutputOptions
    metadata: MetadataOptions
    hub: HubOptions
    previews: PreviewOptions
    logs: LogOptions


def all_defaults() -> dict[str, Any]:
    """The default of every option."""
    return {
        name: field.get_default()
        for group in groups_of(TrainNetworkOptions).values()
        for name, field in group.model_fields.items()
    }


def parse_options(arguments: list[str]) -> TrainNetworkOptions:
    """The options of one run from the command line and `--config_file`."""
    return parse(TrainNetworkOptions, arguments, "Train a LoRA for Stable Diffusion.", REFUSED)
