"""Every option of train_network.py: a list of declarations, in typed groups.

Names, defaults and meanings are those that people know from sd-scripts. What the options mean to each other is declared with them
(see library/option_traits.py); what a value may look like is in option_types.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from library.command_line import OptionGroup, groups_of, parse
from library.diffusion.samplers import SamplerName
from library.option_traits import RECORDED_ELSEWHERE, option, required
from library.training.checks.unsupported_options import UNSUPPORTED
from library.training.option_types import (
    Count,
    CountOrOff,
    IntervalOrOff,
    NumbersAsText,
    Rates,
    StepsOrShare,
    TokenLimit,
)


class ModelOptions(OptionGroup):
    """Model"""

    pretrained_model_name_or_path: str | None = option(
        None,
        help="checkpoint (.safetensors, .ckpt), Diffusers folder or hub id",
        record=RECORDED_ELSEWHERE,
        resume="file name",
        path=True,
    )
    v2: bool = option(False, help="the model is Stable Diffusion 2.x", record="ss_v2")
    v_parameterization: bool = option(False, help="the model predicts velocity (SD 2.x 768)", record=RECORDED_ELSEWHERE)
    vae: str | None = option(
        None, help="another VAE: checkpoint, Diffusers folder or hub id", record=RECORDED_ELSEWHERE, resume="file name", path=True
    )
    no_half_vae: bool = option(
        False,
        help="keep the VAE in float32 (cures black images and NaN latents)",
        only_with=("mixed_precision", ("fp16", "bf16")),
    )
    clip_skip: Count | None = option(None, help="use the text encoder's Nth layer from the end", record="ss_clip_skip")
    xformers: bool = option(
        False, help="attention by xformers, if it is installed and there is a GPU", resume="free", unless=("mem_eff_attn",)
    )
    mem_eff_attn: bool = option(
        False, help="attention that needs little memory: torch's, also where xformers is asked for", resume="free"
    )
    sdpa: bool = option(False, help="attention by torch (this is the default)", resume="free")

    @property
    def source(self) -> str:
        """The model to train on. Raises UserError if none was given."""
        return required(self.pretrained_model_name_or_path, "pretrained_model_name_or_path")

    @property
    def prediction(self) -> Literal["epsilon", "v"]:
        """What the model predicts: noise, or velocity."""
        return "v" if self.v_parameterization else "epsilon"


class DataOptions(OptionGroup):
    """Images"""

    dataset_config: str | None = option(None, help="TOML or JSON file that describes the datasets", resume="free", path=True)
    train_data_dir: str | None = option(
        None, help="folder of images, or of folders named <repeats>_<class>", resume="free", path=True
    )
    in_json: str | None = option(
        None,
        help="metadata file (.json, .jsonl) that lists images below train_data_dir with their captions",
        resume="free",
        path=True,
    )
    conditioning_data_dir: str | None = option(
        None, help="folder of masks for masked_loss, arranged like train_data_dir", resume="free", path=True
    )
    reg_data_dir: str | None = option(None, help="folder of regularisation folders, named likewise", resume="free", path=True)
    dataset_repeats: Count = option(1, help="repeats of every image where nothing else is given", record=RECORDED_ELSEWHERE)
    train_batch_size: Count = option(1, help="images a step", record=RECORDED_ELSEWHERE)
    resolution: NumbersAsText = option(None, help="training size: 512 or width,height", record=RECORDED_ELSEWHERE)
    enable_bucket: bool = option(False, help="group images by aspect ratio", record=RECORDED_ELSEWHERE)
    min_bucket_reso: int = option(256, help="smallest bucket side", record=RECORDED_ELSEWHERE)
    max_bucket_reso: int = option(1024, help="largest bucket side", record=RECORDED_ELSEWHERE)
    bucket_reso_steps: int = option(64, help="bucket sides are multiples of this")
    bucket_no_upscale: bool = option(False, help="never enlarge an image", record=RECORDED_ELSEWHERE)
    resize_interpolation: Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"] | None = option(
        None, help="resizing filter; unset: area to shrink, lanczos to enlarge"
    )
    on_bad_image: Literal["refuse", "skip"] = option(
        "refuse", help="what an unreadable image does: end the run, or be named and skipped", resume="free"
    )
    alpha_mask: bool = option(False, help="an image's alpha channel says how much of it counts")
    prior_loss_weight: float = option(
        1.0, ge=0, help="weight of the loss on regularisation images", record="ss_prior_loss_weight"
    )
    debug_dataset: bool = option(
        False, help="show what the trainer would see, and stop", record=RECORDED_ELSEWHERE, resume="free"
    )


class CaptionOptions(OptionGroup):
    """Captions"""

    caption_extension: str = option(".caption", help="suffix of caption files")
    caption_extention: str | None = option(None, help="old spelling of caption_extension", resume="free")
    shuffle_caption: bool = option(False, help="shuffle the pieces of a caption at each use", record=RECORDED_ELSEWHERE)
    caption_separator: str = option(",", help="what separates the pieces")
    keep_tokens: int = option(0, ge=0, help="pieces at the front that stay", record=RECORDED_ELSEWHERE)
    keep_tokens_separator: str = option("", help="mark in a caption: what stands before it stays")
    secondary_separator: str | None = option(None, help="holds pieces together; becomes caption_separator in the end")
    enable_wildcard: bool = option(False, help="{a|b} alternatives, and one of several caption lines")
    caption_prefix: str | None = option(None, help="text before every caption")
    caption_suffix: str | None = option(None, help="text after every caption")
    caption_dropout_rate: float = option(0.0, ge=0, le=1, help="chance that a caption is empty", record="ss_caption_dropout_rate")
    caption_dropout_every_n_epochs: int = option(
        0, ge=0, help="all captions are empty in every Nth epoch", record="ss_caption_dropout_every_n_epochs"
    )
    caption_tag_dropout_rate: float = option(
        0.0, ge=0, le=1, help="chance that a piece is left out", record="ss_caption_tag_dropout_rate"
    )
    token_warmup_min: int = option(1, ge=0, help="pieces at the first step of token_warmup_step")
    token_warmup_step: float = option(0, ge=0, help="steps (below 1: share of all) until all pieces are used")
    max_token_length: TokenLimit = option(None, help="tokens of a caption; unset: 75", record="ss_max_token_length")
    weighted_captions: bool = option(False, help="read (word:1.2) as a weight")
    cache_text_encoder_outputs: bool = option(
        False, help="encode every caption once, before training, or say why it cannot be done", resume="free"
    )
    cache_text_encoder_outputs_to_disk: bool = option(False, help="keep the encoded captions on disk too", resume="free")

    @property
    def caches_text(self) -> bool:
        """Whether captions must be encoded before training."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    @property
    def tokens(self) -> int:
        """The tokens of a caption with its start and its end."""
        return (self.max_token_length or 75) + 2


class AugmentationOptions(OptionGroup):
    """Augmentation and latent cache"""

    flip_aug: bool = option(False, help="mirror half of the images", record=RECORDED_ELSEWHERE)
    color_aug: bool = option(False, help="change hue or gamma a little", record=RECORDED_ELSEWHERE)
    random_crop: bool = option(False, help="crop at a random place", record=RECORDED_ELSEWHERE)
    face_crop_aug_range: NumbersAsText = option(
        None, help="low,high: crop around the face given in the file name", record="ss_face_crop_aug_range"
    )
    cache_latents: bool = option(False, help="encode every image once, before training", record="ss_cache_latents")
    cache_latents_to_disk: bool = option(
        False, help="keep the encoded images on disk too", record=RECORDED_ELSEWHERE, resume="free"
    )
    vae_batch_size: Count = option(
        1, help="images encoded at once", resume="free", needs=("cache_latents", "cache_latents_to_disk")
    )
    max_data_loader_n_workers: int = option(
        8, ge=0, help="most processes that prepare batches", record=RECORDED_ELSEWHERE, resume="free"
    )
    persistent_data_loader_workers: bool = option(
        False,
        help="keep those processes between epochs",
        record=RECORDED_ELSEWHERE,
        resume="free",
        needs=("max_data_loader_n_workers",),
    )

    @property
    def caches_latents(self) -> bool:
        """Whether images are encoded before training."""
        return self.cache_latents or self.cache_latents_to_disk


class NetworkOptions(OptionGroup):
    """Network"""

    network_module: str | None = option(None, help="Python module of the network: networks.lora", record="ss_network_module")
    network_dim: Count | None = option(None, help="rank; unset: 4", record="ss_network_dim", unless=("dim_from_weights",))
    network_alpha: float = option(
        1.0,
        ge=0,
        help="the network's output is scaled by alpha / rank; 0: alpha = rank",
        record="ss_network_alpha",
        unless=("dim_from_weights",),
    )
    network_dropout: float | None = option(
        None, ge=0, lt=1, help="dropout between the two layers of each LoRA", record="ss_network_dropout"
    )
    network_args: list[str] | None = option(None, help="key=value words for the network module", record=RECORDED_ELSEWHERE)
    network_weights: str | None = option(None, help="start from this LoRA file", resume="file name", path=True)
    dim_from_weights: bool = option(False, help="take rank and alpha of each module from network_weights", path=True)
    network_train_unet_only: bool = option(False, help="LoRA for the U-Net only")
    network_train_text_encoder_only: bool = option(False, help="LoRA for the text encoder only")
    base_weights: list[str] | None = option(
        None, help="LoRA files merged into the model before training", resume="file name", path=True
    )
    base_weights_multiplier: list[float] | None = option(None, help="strengths of base_weights; a missing one is 1")
    scale_weight_norms: float | None = option(
        None, ge=0, help="largest norm of a LoRA module's weight; 0: off", record="ss_scale_weight_norms"
    )

    @property
    def module_name(self) -> str:
        """The module of the network. Raises UserError if none was given."""
        return required(self.network_module, "network_module")


class OptimizerOptions(OptionGroup):
    """Optimizer and learning rate"""

    optimizer_type: str = option(
        "", help="AdamW (default), AdamW8bit, Lion, SGDNesterov, ... or package.Class", record=RECORDED_ELSEWHERE
    )
    use_8bit_adam: bool = option(False, help="old spelling of optimizer_type=AdamW8bit", record=RECORDED_ELSEWHERE)
    use_lion_optimizer: bool = option(False, help="old spelling of optimizer_type=Lion", record=RECORDED_ELSEWHERE)
    optimizer_args: list[str] | None = option(None, help="key=value words for the optimizer", record=RECORDED_ELSEWHERE)
    learning_rate: float = option(2e-6, ge=0, help="learning rate; 1e-4 is usual for a LoRA", record="ss_learning_rate")
    unet_lr: float | None = option(
        None,
        ge=0,
        help="learning rate of the U-Net's LoRA; unset: learning_rate",
        record="ss_unet_lr",
        unless=("network_train_text_encoder_only",),
    )
    text_encoder_lr: Rates = option(
        None,
        help="learning rate of the text encoder's LoRA, or one for each encoder; unset: learning_rate",
        record="ss_text_encoder_lr",
        unless=("network_train_unet_only",),
    )
    max_grad_norm: float = option(1.0, ge=0, help="gradients are scaled down to this norm; 0: off", record="ss_max_grad_norm")
    fused_backward_pass: bool = option(
        False, help="change each weight as soon as its gradient is there: memory for one gradient only"
    )
    lr_scheduler: str = option(
        "constant",
        help="constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, ...",
        record="ss_lr_scheduler",
        unless=("lr_scheduler_type",),
    )
    lr_warmup_steps: StepsOrShare = option(
        0, help="steps, share (0.1) or percentage (10%) of rising learning rate", record="ss_lr_warmup_steps"
    )
    lr_decay_steps: StepsOrShare = option(
        0,
        help="steps or share of falling rate (warmup_stable_decay)",
        unless=("lr_scheduler_type",),
        only_with=("lr_scheduler", ("warmup_stable_decay",)),
    )
    lr_scheduler_num_cycles: Count = option(
        1,
        help="cycles of cosine_with_restarts",
        unless=("lr_scheduler_type",),
        only_with=("lr_scheduler", ("cosine_with_restarts",)),
    )
    lr_scheduler_power: float = option(
        1.0, help="power of polynomial", unless=("lr_scheduler_type",), only_with=("lr_scheduler", ("polynomial",))
    )
    lr_scheduler_timescale: Count | None = option(
        None,
        help="time scale of inverse_sqrt; unset: warm-up steps",
        unless=("lr_scheduler_type",),
        only_with=("lr_scheduler", ("inverse_sqrt",)),
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        ge=0,
        le=1,
        help="lowest rate of cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, as a share",
        unless=("lr_scheduler_type",),
        only_with=("lr_scheduler", ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")),
    )
    lr_scheduler_type: str = option("", help="any class of torch.optim.lr_scheduler, or package.Class", record=RECORDED_ELSEWHERE)
    lr_scheduler_args: list[str] | None = option(None, help="key=value words for it")


class TrainingOptions(OptionGroup):
    """Training"""

    max_train_steps: Count = option(
        1600, help="optimizer steps", record="ss_max_train_steps", resume="free", unless=("max_train_epochs",)
    )
    max_train_epochs: CountOrOff = option(
        None, help="passes over the data; beats max_train_steps", record=RECORDED_ELSEWHERE, resume="free"
    )
    gradient_accumulation_steps: Count = option(1, help="batches an optimizer step", record="ss_gradient_accumulation_steps")
    ddp_timeout: Count | None = option(None, help="minutes that a process waits for the others; unset: 180")
    gradient_checkpointing: bool = option(
        False, help="save memory by computing activations twice", record="ss_gradient_checkpointing", resume="free"
    )
    gradient_checkpointing_budget: float | None = option(
        None,
        gt=0,
        help="GiB that the run may use: only what is above them is computed twice; unset: all",
        resume="free",
        needs=("gradient_checkpointing",),
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", help="number format of the frozen model and of the arithmetic", record="ss_mixed_precision"
    )
    seed: int | None = option(
        None, help="seed of everything random; unset: a new one, which is recorded", record="ss_seed", resume="free"
    )
    on_nonfinite_loss: Literal["stop", "skip"] = option(
        "stop",
        help="what a loss of NaN or infinity does: end the run, or skip the batch (which waits for each loss)",
        resume="free",
    )


class LossOptions(OptionGroup):
    """Noise and loss"""

    noise_offset: float | None = option(
        None, ge=0, help="strength of a random shift of each channel of the noise; 0.05 is usual", record="ss_noise_offset"
    )
    noise_offset_random_strength: bool = option(
        False, help="draw that strength anew for each batch, between 0 and noise_offset", record="ss_noise_offset_random_strength"
    )
    adaptive_noise_scale: float | None = option(
        None, help="adds this times the mean brightness of each latent channel to noise_offset", record="ss_adaptive_noise_scale"
    )
    multires_noise_iterations: int | None = option(
        None, ge=0, le=16, help="levels of coarser noise that are added; 6 to 10 is usual", record="ss_multires_noise_iterations"
    )
    multires_noise_discount: float = option(
        0.3,
        gt=0,
        help="each coarser level counts this many times the one before",
        record="ss_multires_noise_discount",
        needs=("multires_noise_iterations",),
    )
    ip_noise_gamma: float | None = option(
        None, ge=0, help="input perturbation: noise that the target does not know of; 0.1 is usual", record="ss_ip_noise_gamma"
    )
    ip_noise_gamma_random_strength: bool = option(
        False,
        help="draw that strength anew for each batch, between 0 and ip_noise_gamma",
        record="ss_ip_noise_gamma_random_strength",
    )
    zero_terminal_snr: bool = option(
        False, help="noise schedule that ends in pure noise; for models that predict velocity", record="ss_zero_terminal_snr"
    )
    min_timestep: int | None = option(None, ge=0, le=999, help="lowest timestep that is trained; unset: 0")
    max_timestep: int | None = option(None, ge=1, le=1000, help="timesteps below this are trained; unset: 1000")
    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = option("l2", help="how an error counts", record="ss_loss_type")
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr",
        help="how the width of huber and smooth_l1 depends on the timestep",
        record="ss_huber_schedule",
        only_with=("loss_type", ("huber", "smooth_l1")),
    )
    huber_c: float = option(
        0.1,
        gt=0,
        help="width of huber and smooth_l1: errors beyond it count linearly",
        record="ss_huber_c",
        only_with=("loss_type", ("huber", "smooth_l1")),
    )
    huber_scale: float = option(
        1.0, gt=0, help="factor of that width", record="ss_huber_scale", only_with=("loss_type", ("huber", "smooth_l1"))
    )
    masked_loss: bool = option(False, help="masks of conditioning_data_dir say which parts of an image count")
    min_snr_gamma: float | None = option(None, ge=0, help="Min-SNR loss weighting; 5 is usual", record="ss_min_snr_gamma")
    debiased_estimation_loss: bool = option(
        False, help="loss weighting by one over the root of the signal-to-noise ratio", record="ss_debiased_estimation"
    )
    scale_v_pred_loss_like_noise_pred: bool = option(False, help="weigh the loss of a velocity model as that of a noise model")
    v_pred_like_loss: float | None = option(None, ge=0, help="share of a velocity-like loss that is added for a noise model")


class PrecisionOptions(OptionGroup):
    """Precision and memory"""

    full_fp16: bool = option(
        False, help="the network's own weights in fp16 too (with mixed_precision=fp16)", record="ss_full_fp16"
    )
    full_bf16: bool = option(False, help="the network's own weights in bf16 too (with mixed_precision=bf16)")
    base_dtype: Literal["int8", "fp8", "nf4"] | None = option(
        None, help="format in which the frozen U-Net and text encoder are kept; they are unpacked layer by layer"
    )
    fp8_base: bool = option(False, help="the same as base_dtype=fp8", record="ss_fp8_base", unless=("base_dtype",))
    fp8_base_unet: bool = option(
        False, help="the same for the U-Net alone", record="ss_fp8_base_unet", unless=("base_dtype", "fp8_base")
    )
    lowram: bool = option(
        False, help="main memory is short: nothing is moved there from the GPU", record="ss_lowram", resume="free"
    )
    highvram: bool = option(
        False, help="GPU memory is plentiful: VAE and text encoder stay there, and its cache is not emptied", resume="free"
    )
    torch_compile: bool = option(False, help="compile the model with torch.compile; the first steps take minutes", resume="free")
    dynamo_backend: str = option(
        "inductor", help="back end of torch_compile", resume="free", needs=("torch_compile",), off=("no",)
    )


class ValidationOptions(OptionGroup):
    """Validation, early stopping, averaged weights"""

    validation_split: float = option(
        0.0, ge=0, lt=1, help="share of the images that is held out and validated with", record="ss_validation_split"
    )
    validation_seed: int | None = option(
        None, help="seed of what is held out and of the noise it is measured with; unset: seed", record="ss_validation_seed"
    )
    validate_every_n_steps: CountOrOff = option(
        None, help="validate after every Nth step", record="ss_validate_every_n_steps", resume="free", needs=("validation_split",)
    )
    validate_every_n_epochs: CountOrOff = option(
        None,
        help="validate after every Nth epoch; unset: every epoch",
        record="ss_validate_every_n_epochs",
        resume="free",
        needs=("validation_split",),
    )
    max_validation_steps: CountOrOff = option(
        None, help="most batches of one validation", record="ss_max_validation_steps", needs=("validation_split",)
    )
    early_stopping_patience: CountOrOff = option(
        None, help="end the run after this number of validations in a row without a better one", resume="free"
    )
    ema_decay: float | None = option(
        None, gt=0, lt=1, help="average the weights over the steps, and use the average; 0.99 to 0.9999"
    )


class StateOptions(OptionGroup):
    """Saving and resuming the state"""

    decides_what_is_trained: ClassVar[bool] = False

    save_state: bool = option(False, help="save the state of the run with every file, and at the end")
    save_state_on_train_end: bool = option(False, help="save it at the end only", unless=("save_state",))
    save_last_n_epochs_state: int | None = option(
        None,
        ge=0,
        help="keep only this many epoch states; unset: save_last_n_epochs",
        needs=(("save_state",), ("save_every_n_epochs", "save_n_epoch_ratio")),
    )
    save_last_n_steps_state: int | None = option(
        None,
        ge=0,
        help="remove step states older than this; unset: save_last_n_steps",
        needs=(("save_state",), ("save_every_n_steps",)),
    )
    resume: str | None = option(None, help="state folder to go on from, or the folder that holds them", path=True)
    initial_epoch: Count | None = option(None, help="epoch to begin with, from 1", unless=("initial_step",))
    initial_step: int | None = option(None, ge=0, help="step to begin after; beats initial_epoch")
    skip_until_initial_step: bool = option(False, help="leave out the data before it; else its epoch begins anew")


class OutputOptions(OptionGroup):
    """Output"""

    decides_what_is_trained: ClassVar[bool] = False

    output_dir: str | None = option(None, help="folder for everything that is written", path=True)
    output_name: str | None = option(None, help="file name of the LoRA, without suffix", record="ss_output_name")
    save_model_as: Literal["safetensors", "ckpt", "pt"] = option("safetensors", help="file format")
    save_precision: Literal["float", "fp16", "bf16"] | None = option(None, help="number format in the file; unset: as trained")
    no_report: bool = option(False, help="write no page about the run (output_name.html)")
    save_every_n_epochs: CountOrOff = option(None, help="save after every Nth epoch", unless=("save_n_epoch_ratio",))
    save_every_n_steps: CountOrOff = option(None, help="save after every Nth step")
    save_n_epoch_ratio: CountOrOff = option(None, help="save about this many times; sets save_every_n_epochs")
    save_last_n_epochs: CountOrOff = option(
        None, help="keep only this many epoch files", needs=("save_every_n_epochs", "save_n_epoch_ratio")
    )
    save_last_n_steps: CountOrOff = option(
        None, help="remove step files that are older than this many steps", needs=("save_every_n_steps",)
    )

    @property
    def file_stem(self) -> str:
        """What the names of the final LoRA and of the files about the run begin with."""
        return self.output_name or "last"

    @property
    def folder(self) -> Path:
        """--output_dir. Raises UserError if it was not given."""
        return Path(required(self.output_dir, "output_dir"))


def _in_metadata(**words: Any) -> Any:
    """An option whose value is written into the file, but with --no_metadata."""
    return option(None, unless=("no_metadata",), **words)


class MetadataOptions(OptionGroup):
    """What is written into the file about it"""

    decides_what_is_trained: ClassVar[bool] = False

    no_metadata: bool = option(False, help="write only what loaders need into the file's metadata")
    training_comment: str | None = _in_metadata(help="text for the file's metadata", record="ss_training_comment")
    metadata_title: str | None = _in_metadata(help="title; unset: output_name")
    metadata_author: str | None = _in_metadata(help="who made it", record="modelspec.author")
    metadata_description: str | None = _in_metadata(help="what it is", record="modelspec.description")
    metadata_license: str | None = _in_metadata(help="licence of the file", record="modelspec.license")
    metadata_tags: str | None = _in_metadata(help="tags, with commas between them", record="modelspec.tags")
    metadata_usage_hint: str | None = _in_metadata(help="how to use it", record="modelspec.usage_hint")
    metadata_trigger_phrase: str | None = _in_metadata(
        help="the words that call it up in a prompt", record="modelspec.trigger_phrase"
    )
    metadata_thumbnail: str | None = _in_metadata(help="an image for lists: a file, or a data: text", path=True)
    metadata_merged_from: str | None = _in_metadata(help="what it was merged from", record="modelspec.merged_from")
    metadata_preprocessor: str | None = _in_metadata(help="preprocessor that images need", record="modelspec.preprocessor")
    metadata_is_negative_embedding: str | None = _in_metadata(
        help="whether it is meant for the negative prompt", record="modelspec.is_negative_embedding"
    )
    from_metadata: str | None = option(None, help="print the command and dataset file that made this LoRA file, and stop")


class HubOptions(OptionGroup):
    """Hugging Face hub"""

    decides_what_is_trained: ClassVar[bool] = False

    huggingface_repo_id: str | None = option(
        None, help="repository for copies of all saved files: user/name; made if it does not exist"
    )
    huggingface_repo_type: Literal["model", "dataset", "space"] | None = option(
        None, help="kind of that repository; unset: model", needs=("huggingface_repo_id",)
    )
    huggingface_path_in_repo: str | None = option(None, help="folder in it; unset: none", needs=("huggingface_repo_id",))
    huggingface_token: str | None = option(
        None,
        help="access token; unset: that of `hf auth login`",
        secret=True,
        needs=("huggingface_repo_id", "resume_from_huggingface"),
    )
    huggingface_repo_visibility: Literal["public", "private"] | None = option(
        None, help="for a repository that is made; unset: private", needs=("huggingface_repo_id",)
    )
    async_upload: bool = option(False, help="upload in the background, except the last file", needs=("huggingface_repo_id",))
    save_state_to_huggingface: bool = option(
        False, help="upload saved states too", needs=("save_state", "save_state_on_train_end")
    )
    resume_from_huggingface: bool = option(
        False, help="resume names a state on the hub: user/repo/folder, or with :revision:type behind it"
    )


class PreviewOptions(OptionGroup):
    """Sample images while training"""

    decides_what_is_trained: ClassVar[bool] = False

    sample_prompts: str | None = option(
        None,
        help="file of prompts (.txt, .toml, .json)",
        path=True,
        needs=("sample_every_n_epochs", "sample_every_n_steps", "sample_at_first"),
    )
    sample_every_n_epochs: IntervalOrOff = option(None, help="sample after every Nth epoch; 0: off")
    sample_every_n_steps: IntervalOrOff = option(
        None, help="sample after every Nth step; 0: off", unless=("sample_every_n_epochs",)
    )
    sample_at_first: bool = option(False, help="also sample before the first step")
    sample_sampler: SamplerName = option("ddim", help="sampler", needs=("sample_prompts",))

    @property
    def are_asked_for(self) -> bool:
        """Whether there is a moment at which to sample. Front ends name a prompt file also without one."""
        return bool(self.sample_every_n_epochs or self.sample_every_n_steps or self.sample_at_first)


class LogOptions(OptionGroup):
    """Logs and config file"""

    decides_what_is_trained: ClassVar[bool] = False

    logging_dir: str | None = option(None, help="folder for TensorBoard logs", path=True)
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        None, help="tracker; unset: TensorBoard if logging_dir is given"
    )
    log_prefix: str | None = option(None, help="text before the time in the log folder's name", needs=("logging_dir",))
    log_tracker_name: str | None = option(
        None, help="name of the run's folder, and of the wandb project; unset: network_train", needs=("logging_dir", "log_with")
    )
    wandb_run_name: str | None = option(
        None, help="name of the run on wandb; unset: wandb makes one up", only_with=("log_with", ("wandb", "all"))
    )
    wandb_api_key: str | None = option(
        None, help="key for wandb; unset: that of `wandb login`", secret=True, only_with=("log_with", ("wandb", "all"))
    )
    log_tracker_config: str | None = option(
        None,
        help="TOML file with tables [tensorboard] and [wandb]: arguments for their start",
        path=True,
        needs=("logging_dir", "log_with"),
    )
    log_config: bool = option(
        False, help="record the options with the logs, without paths and secrets", needs=("logging_dir", "log_with")
    )
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = option(
        None, help="show messages from this level on; unset: INFO"
    )
    console_log_file: str | None = option(None, help="write messages into this file instead of the console", path=True)
    console_log_simple: bool = option(False, help="plain lines without colours and columns")
    output_config: bool = option(False, help="write the options into config_file, and stop")
    config_file: str | None = option(None, help="TOML or JSON file with any of these options; the command line wins", path=True)


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
    return parse(TrainNetworkOptions, arguments, "Train a LoRA for Stable Diffusion.", UNSUPPORTED)
