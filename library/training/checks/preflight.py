"""All checks that need no model, in one pass, so that a user sees all problems at once, each with its cure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from library.data.advice import advice
from library.data.buckets import wrong_sides
from library.data.config_keys import DatasetConfig
from library.data.dataset import TrainingDataset
from library.data.text_cache import varying_captions
from library.devices import available_memory, check_precision
from library.errors import Problems
from library.formats.lora_base import lora_metadata, trained_on_another_file, unlike_base
from library.formats.tensor_file import MODEL_SUFFIXES
from library.generation.prompts.prompt_file import read_prompt_file
from library.generation.prompts.spec import PromptSpec
from library.models.family import Family
from library.models.loading import Header, read_header
from library.models.registry import FAMILIES, check_family
from library.training.checks.contradictions import contradictions
from library.training.checks.disk_space import space_needed, too_little_space
from library.training.checks.estimates import estimated_bytes, largest_batch
from library.training.checks.idle_options import idle_options
from library.training.checks.model_facts import following_model
from library.training.checks.trial import trial_optimizer, try_schedule
from library.training.datasets import dataset_configs, open_dataset
from library.training.memory.compiling import check_backend
from library.training.memory.precision import NumberFormats, check_half_weights
from library.training.network import check_network_args, trains_text_encoder
from library.training.optimization.ema import make_average
from library.training.optimization.fused_backward import check_fused_backward
from library.training.optimization.optimizer_rules import adafactor
from library.training.optimization.optimizers import optimizer_name, spec_named
from library.training.optimization.schedules import create_schedule, waits_for_validation
from library.training.options import (
    MetadataOptions,
    ModelOptions,
    NetworkOptions,
    OptimizerOptions,
    PreviewOptions,
    TrainNetworkOptions,
    ValidationOptions,
)
from library.training.outputs.metadata import as_data_url
from library.training.outputs.saving import ModelFiles
from library.training.outputs.trackers import check_trackers
from library.training.plan import Plan, Progress
from library.training.run_state.resume import check_start, chosen_seed, open_state
from library.training.run_state.state import State

USUAL_TEXT_RATE = 5e-5  # of text encoders
FEW_STEPS = re.compile(r"(?<![a-z])(turbo|lightning|hyper|lcm|dmd2?)(?![a-z])", re.IGNORECASE)  # in names of distilled models
MANY = 10**9  # steps of a run whose length is not known yet

Checks = list[Callable[[], Iterable[str] | None]]  # a check returns what is wrong, or raises it as a UserError
Memory = tuple[int, str]  # as `available_memory` gives it


@dataclass(frozen=True)
class Ready:
    """What the checks opened: the images, the seed, and where the run begins.

    options: as given; those left open follow the model's header. notes: advice that was printed.
    """

    options: TrainNetworkOptions
    dataset: TrainingDataset
    seed: int
    header: Header  # of the model
    plan: Plan
    start: Progress
    resumed: State | None
    notes: Sequence[str] = ()

    @property
    def formats(self) -> NumberFormats:
        """As the options say."""
        return NumberFormats.of(self.options.training, self.options.precision)


def preflight(
    options: TrainNetworkOptions, device: torch.device, world: int, family: str | None = None, memory: Memory | None = None
) -> Ready:
    """Check all that can be checked without a model. Raises UserErrors with everything that is wrong.

    family: the one family of models to accept, by its name. memory: of the device; None: what is available now. The images are
    checked even if an option is wrong already.
    """
    problems = Problems()
    header = problems.of(read_model_header, options.model)
    if header is not None:
        if family:
            problems.of(check_family, options.model.source, header.family, family)
        model, loss, line = following_model(options.model, options.loss, header)
        options = options.model_copy(update={"model": model, "loss": loss})
        if line:
            print(line)
    problems.found += contradictions(options)
    run_checks(problems, checks_of_options(options, device))
    configs = problems.of(dataset_configs, options)
    resumed = problems.of(open_state, options.state.resume, options.hub, options.output.output_name)
    seed = problems.of(chosen_seed, options.training.seed, resumed) or 0
    dataset = open_images(problems, options, configs, seed, header.family if header else None)
    dataset.world = world
    plan = Plan.of(options.training, dataset.num_batches, world)
    run_checks(problems, checks_of_plan(options, plan, dataset, header))
    start = problems.of(check_start, options, plan, dataset, resumed)
    problems.raise_found()
    assert header is not None and start is not None  # else there was a problem
    notes = print_advice(options, dataset, device, header, memory)
    return Ready(options, dataset, seed, header, plan, start, resumed, notes)


def check_images(options: TrainNetworkOptions) -> TrainingDataset:
    """The images alone, for --debug_dataset, which needs no model. Raises UserErrors with everything that is wrong."""
    problems = Problems()
    problems.found += contradictions(options)
    configs, seed = problems.of(dataset_configs, options), problems.of(chosen_seed, options.training.seed, None) or 0
    dataset = open_images(problems, options, configs, seed, None)
    problems.raise_found()
    return dataset


def open_images(
    problems: Problems, options: TrainNetworkOptions, configs: list[DatasetConfig] | None, seed: int, family: Family | None
) -> TrainingDataset:
    """The indexed images. Raises UserErrors with all problems until now if they cannot be opened.

    family: of the model; None if there is no model to look at.
    """
    if configs and family:
        problems.found += wrong_sizes(configs, family)
    dataset = problems.of(open_dataset, options, configs, seed, family or FAMILIES[0]) if configs else None
    if dataset is None:
        problems.raise_found()
    assert dataset is not None  # else there was a problem
    return dataset


def run_checks(problems: Problems, checks: Checks) -> None:
    """Do all checks and collect what they find."""
    for check in checks:
        problems.found += problems.of(_found, check) or []


def _found(check: Callable[[], Iterable[str] | None]) -> list[str]:
    return list(check() or ())


def checks_of_options(options: TrainNetworkOptions, device: torch.device) -> Checks:
    """Checks that need no images: paths, folders, names and packages."""
    formats = NumberFormats.of(options.training, options.precision)
    return [
        lambda: check_precision(options.training.mixed_precision, device),
        lambda: missing_models(options.model),
        lambda: ModelFiles(options.output).check_folder() if options.output.output_dir else None,
        lambda: missing_networks(options.network),
        lambda: check_network_args(options.network) if options.network.network_module else None,
        lambda: check_optimizer(options.optimizer, options.validation, formats),
        lambda: check_schedule(options.optimizer),
        lambda: check_trackers(options.logs),
        lambda: check_prompts(options.previews),
        lambda: check_thumbnail(options.metadata),
        lambda: check_backend(options.precision.dynamo_backend, device) if options.precision.torch_compile else None,
    ]


def checks_of_plan(options: TrainNetworkOptions, plan: Plan, dataset: TrainingDataset, header: Header | None) -> Checks:
    """Checks that need the images: schedule, disk space, validation."""
    return [
        lambda: try_schedule(options.optimizer, plan.max_steps),
        lambda: (
            check_fused_backward(options.optimizer, options.training, plan.processes)
            if options.optimizer.fused_backward_pass
            else None
        ),
        lambda: nothing_to_validate_with(options.validation, options.optimizer, dataset),
        lambda: (
            changing_texts(options.network, options.optimizer, dataset, header)
            if options.captions.caches_text and header
            else None
        ),
        lambda: too_little_space(space_needed(options, plan, dataset, header)) if options.output.output_dir and header else None,
    ]


def check_optimizer(options: OptimizerOptions, validation: ValidationOptions, formats: NumberFormats) -> None:
    """Whether there is such an optimizer, whether it takes its arguments, and whether it fits the other options."""
    optimizer, name = trial_optimizer(options)
    check_half_weights(optimizer, name, formats.trained)
    make_average(validation, [], optimizer)


def check_schedule(options: OptimizerOptions) -> None:
    """Whether there is such a schedule. The length of the run is not known yet."""
    create_schedule(options, trial_optimizer(options)[0], MANY)


def missing_models(options: ModelOptions) -> Iterable[str]:
    """Models that look like files or folders and are not there. Other names may be those of the hub."""
    for option in ("pretrained_model_name_or_path", "vae"):
        name = getattr(options, option)
        if name and looks_like_path(name) and not Path(name).exists():
            cure = "~ is not understood here, write the folder out" if name.startswith("~") else "check the path"
            yield f"--{option}: there is no file or folder {name}; {cure} (looked in {Path.cwd()})"


def read_model_header(options: ModelOptions) -> Header | None:
    """The family of the model and the shapes of its weights; None if there is no such file, which is reported already."""
    name = options.pretrained_model_name_or_path
    if not name or (looks_like_path(name) and not Path(name).exists()):
        return None
    return read_header(name, options.v2)


def looks_like_path(name: str) -> bool:
    """Whether a name is a path and no `user/model` of the hub; it is one if its first half is a folder here."""
    in_folder = "/" in name and Path(name).parent.is_dir()
    return (
        Path(name).suffix in MODEL_SUFFIXES
        or bool(re.match(r"[./~]|[A-Za-z]:", name))
        or "\\" in name
        or name.count("/") > 1
        or in_folder
    )


def named_networks(options: NetworkOptions) -> list[tuple[str, str]]:
    """(option, path) of the LoRA files to go on from and to merge."""
    named = [("--network_weights", options.network_weights)] + [("--base_weights", path) for path in options.base_weights or ()]
    return [(option, path) for option, path in named if path]


def missing_networks(options: NetworkOptions) -> Iterable[str]:
    """LoRA files that are not there."""
    for option, path in named_networks(options):
        if not Path(path).is_file():
            yield f"{option} {path}: there is no such file; check the path (looked in {Path.cwd()})"


def nothing_to_validate_with(options: ValidationOptions, optimizer: OptimizerOptions, dataset: TrainingDataset) -> Iterable[str]:
    """What waits for validations, if no images are held out for them."""
    wanted = {
        "early_stopping_patience": options.early_stopping_patience,
        "lr_scheduler reduce_lr_on_plateau": waits_for_validation(optimizer),
    }
    for name in [name for name, value in wanted.items() if value and not dataset.table.held_out.any()]:
        yield f"--{name} needs images to validate with; give --validation_split 0.1, say, or the key in the dataset file"


def wrong_sizes(configs: Sequence[DatasetConfig], family: Family) -> Iterable[str]:
    """Datasets whose training sizes the model does not take."""
    for number, config in enumerate(configs, start=1):
        wrong = wrong_sides(config, family.side_step, family.title)
        if wrong:
            yield f"dataset {number}: {wrong}"


def changing_texts(
    network: NetworkOptions, optimizer: OptimizerOptions, dataset: TrainingDataset, header: Header
) -> Iterable[str]:
    """Why --cache_text_encoder_outputs cannot be done: what the text encoders give is not the same at every use."""
    if trains_text_encoder(network, optimizer, len(header.family.text_parts)):
        yield (
            "--cache_text_encoder_outputs: the text encoder is trained, so what it gives changes with every step; add "
            "--network_train_unet_only, or take out --cache_text_encoder_outputs"
        )
    yield from varying_captions(dataset.table)


def check_prompts(options: PreviewOptions) -> None:
    """Whether --sample_prompts can be read. Raises UserError."""
    if options.sample_prompts and options.are_asked_for:
        read_prompt_file(Path(options.sample_prompts), PromptSpec(sampler=options.sample_sampler))


def check_thumbnail(options: MetadataOptions) -> None:
    """Whether the image of --metadata_thumbnail is there. Raises UserError."""
    if options.metadata_thumbnail:
        as_data_url(options.metadata_thumbnail)


def print_advice(
    options: TrainNetworkOptions, dataset: TrainingDataset, device: torch.device, header: Header, memory: Memory | None = None
) -> list[str]:
    """Print advice on options that are allowed and probably a mistake, and the memory that will be used. Returns the advice."""
    notes, rates = [], options.optimizer
    if rates.learning_rate == 2e-6 and not (rates.unet_lr or rates.text_encoder_lr):
        notes.append("--learning_rate is 2e-6, far too low for a LoRA to learn anything; 1e-4 is usual")
    if shares_the_rate(options, header.family):
        notes.append(
            f"all {len(header.family.text_parts)} text encoders learn at the U-Net's rate, which overtrains them first: give "
            "each its own, such as --text_encoder_lr 5e-5 1e-5, or take --network_train_unet_only"
        )
    notes += advice(dataset.table)
    if FEW_STEPS.search(Path(options.model.pretrained_model_name_or_path or "").stem):
        notes.append(
            "the model's name says that it draws in few steps, which training unlearns: train on the model that it was made "
            "from, and use the LoRA with it"
        )
    notes += loras_of_other_models(options, header)
    idle = idle_options(options, dataset.table.configs)
    if idle:
        notes.append(f"given, but without effect: {'; '.join(idle)}")
    for note in notes:
        print(note)
    needed, (there, whose) = estimated_bytes(options, header, *largest_batch(dataset)), memory or available_memory(device)
    line = f"memory: about {needed / 2**30:.1f} of {whose} {there / 2**30:.1f} GiB will be used (a rough estimate)"
    if needed > there:
        line += "; if it does not fit: --gradient_checkpointing, --cache_latents, a smaller batch or --resolution"
        notes.append(line)
    print(line)
    return notes


def loras_of_other_models(options: TrainNetworkOptions, header: Header) -> Iterable[str]:
    """LoRAs to go on from or to merge that were trained on another model than the one given."""
    named = [(option, file, lora_metadata(Path(file))) for option, file in named_networks(options.network)]
    for option, file, metadata in named:
        for reason in unlike_base(metadata, header.family.records, options.model.prediction):
            yield f"{option} {file} {reason}"
    for option, file, metadata in named:
        goes_on = option == "--network_weights"
        if goes_on and (name := trained_on_another_file(metadata, Path(options.model.source))):
            yield f"{option} {file} was trained on another file, {name}: what it learned may fit this model less"


def shares_the_rate(options: TrainNetworkOptions, family: Family) -> bool:
    """Whether several text encoders are trained at the rate of the U-Net, and that is high for them."""
    chosen, encoders = options.optimizer, len(family.text_parts)
    spec = spec_named(optimizer_name(chosen))
    if encoders < 2 or chosen.text_encoder_lr is not None or chosen.learning_rate <= USUAL_TEXT_RATE:
        return False
    takes_rates = not spec.finds_rate and spec.prepare is not adafactor
    return takes_rates and trains_text_encoder(options.network, chosen, encoders)
