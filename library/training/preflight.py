"""What can be found out before any model loads: `check_options` at once, `check_plan` when the pictures are known.

All problems are told together, each with its cure, so that nobody mends one after the other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from library.data.config import DatasetDefaults, datasets_from_file, datasets_from_folders
from library.data.dataset import TrainingDataset
from library.errors import UserError, UserErrors
from library.generation.prompts import PromptSpec, read_prompt_file
from library.training.estimates import estimated_gpu_bytes, network_file_bytes
from library.training.fused_backward import check_fused_backward
from library.training.metadata import as_data_url
from library.training.network import check_network_args
from library.training.optimizers import create_optimizer
from library.training.options import TrainNetworkOptions
from library.training.plan import Plan
from library.training.saving import ModelFiles
from library.training.schedules import create_schedule
from library.training.trackers import check_trackers

MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
ENOUGH = 1.1  # times the space that the files need


def check_options(options: TrainNetworkOptions, defaults: DatasetDefaults) -> None:
    """Paths, folders, names and packages. Raises UserErrors with everything that is wrong."""
    checks: list[Callable[[], Iterable[str] | None]] = [
        lambda: missing_models(options),
        lambda: missing_pictures(options, defaults),
        lambda: ModelFiles(options.output).check_folder(),
        lambda: missing_networks(options),
        lambda: missing_state(options),
        lambda: check_network_args(options.network),
        lambda: trial_optimizer(options) and None,
        lambda: check_trackers(options.logs),
        lambda: check_prompts(options),
        lambda: as_data_url(options.metadata.metadata_thumbnail or "data:") and None,
    ]
    raise_together(checks)
    for note in notes(options):
        print(note)


def check_plan(options: TrainNetworkOptions, plan: Plan, dataset: TrainingDataset, device: torch.device) -> None:
    """Schedule, disk space and memory. Raises UserErrors; too little memory is a note, since the estimate is rough."""
    trial = trial_optimizer(options)
    raise_together(
        [
            lambda: create_schedule(options.optimizer, trial, plan.max_steps) and None,
            lambda: options.optimizer.fused_backward_pass and check_fused_backward(options, trial, plan.processes),
            lambda: too_little_space(space_needed(options, plan, dataset)),
        ]
    )
    if device.type == "cuda":
        needed, there = estimated_gpu_bytes(options, dataset), torch.cuda.get_device_properties(device).total_memory
        much = needed > there
        cure = "; if it does not fit: --gradient_checkpointing, --cache_latents, a smaller batch or --resolution" if much else ""
        print(f"memory: about {needed / 2**30:.1f} GiB of the GPU's {there / 2**30:.1f} GiB will be used (a rough estimate){cure}")


def trial_optimizer(options: TrainNetworkOptions) -> torch.optim.Optimizer:
    """The optimizer that was asked for, on a parameter that is nobody's: whether it is there, and takes its arguments."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]
    return create_optimizer(options.optimizer, groups, torch.device("cpu"), lambda note: None)[0]


def raise_together(checks: Iterable[Callable[[], Iterable[str] | None]]) -> None:
    """Do all checks; a check returns what is wrong, or raises its one UserError."""
    problems: list[str] = []
    for check in checks:
        try:
            problems += check() or ()
        except UserError as error:
            problems += getattr(error, "problems", [str(error)])
    if problems:
        raise UserErrors(list(dict.fromkeys(problems)))


def missing_models(options: TrainNetworkOptions) -> Iterable[str]:
    """Models that look like files and are not there. Other names may be those of the hub."""
    for option in ("pretrained_model_name_or_path", "vae"):
        name = getattr(options.model, option)
        if name and Path(name).suffix in MODEL_SUFFIXES and not Path(name).exists():
            yield f"--{option}: there is no file or folder {name}; check the path (looked in {Path.cwd()})"


def missing_networks(options: TrainNetworkOptions) -> Iterable[str]:
    chosen = options.network
    named = [("network_weights", chosen.network_weights)] + [("base_weights", path) for path in chosen.base_weights or ()]
    for option, path in named:
        if path and not Path(path).is_file():
            yield f"--{option} {path}: there is no such file; check the path (looked in {Path.cwd()})"


def missing_state(options: TrainNetworkOptions) -> Iterable[str]:
    """The folder of --resume; whether it holds a whole state shows when it is read."""
    path = options.state.resume
    if path and not options.hub.resume_from_huggingface and not Path(path).is_dir():
        yield f"--resume {path}: there is no such folder; give a state folder, or the folder that holds them"


def missing_pictures(options: TrainNetworkOptions, defaults: DatasetDefaults) -> None:
    """The dataset file and its folders, without reading a picture. A data set of another kind shows when it is opened."""
    data = options.data
    if data.dataset_config:
        datasets_from_file(Path(data.dataset_config), defaults)
    elif data.in_json:
        if not Path(data.in_json).is_file():
            raise UserError(f"--in_json {data.in_json}: there is no such file; check the path (looked in {Path.cwd()})")
    elif data.train_data_dir:
        reg, masks = (Path(folder) if folder else None for folder in (data.reg_data_dir, data.conditioning_data_dir))
        datasets_from_folders(Path(data.train_data_dir), reg, defaults, masks)


def check_prompts(options: TrainNetworkOptions) -> None:
    path = options.previews.sample_prompts
    if path:
        read_prompt_file(Path(path), PromptSpec(sampler=options.previews.sample_sampler))


def notes(options: TrainNetworkOptions) -> Iterable[str]:
    """What is allowed and most likely not meant."""
    previews, rates = options.previews, options.optimizer
    if previews.sample_prompts and not (previews.sample_every_n_epochs or previews.sample_every_n_steps or previews.sample_at_first):
        yield "--sample_prompts draws nothing without --sample_every_n_epochs, --sample_every_n_steps or --sample_at_first"
    if rates.learning_rate == 2e-6 and not (rates.unet_lr or rates.text_encoder_lr):
        yield "--learning_rate is 2e-6, far too low for a LoRA to learn anything; 1e-4 is usual"


def space_needed(options: TrainNetworkOptions, plan: Plan, dataset: TrainingDataset) -> dict[Path, int]:
    """Bytes that the run is about to write, by folder."""
    needed = {Path(options.output.output_dir): planned_files(options, plan) * network_file_bytes(options)}
    if options.augmentation.cache_latents_to_disk:
        table = dataset.table
        for subset in table.subsets:
            rows = range(subset.start, subset.end)
            pixels = sum(width * height for width, height in (table.bucket_size(row) for row in rows if table.repeats[row]))
            folder = subset.config.image_dir
            needed[folder] = needed.get(folder, 0) + pixels // 64 * 16 * (2 if subset.config.flip_aug else 1)
    return needed


def planned_files(options: TrainNetworkOptions, plan: Plan) -> int:
    """How many network files there will be at most at one time."""
    output = options.output
    by_epoch = ModelFiles(output).epoch_interval(plan.epochs)
    epochs = (plan.epochs - 1) // by_epoch if by_epoch else 0
    steps = plan.max_steps // output.save_every_n_steps if output.save_every_n_steps else 0
    if output.save_last_n_epochs:
        epochs = min(epochs, output.save_last_n_epochs + 1)
    if output.save_last_n_steps:
        steps = min(steps, output.save_last_n_steps // output.save_every_n_steps + 2) if steps else 0
    return 1 + epochs + steps


def too_little_space(needed: dict[Path, int]) -> Iterable[str]:
    """Folders on whose disk there is too little room; several folders may share a disk."""
    by_disk: dict[int, tuple[int, list[Path]]] = {}
    for folder, size in needed.items():
        disk = existing(folder).stat().st_dev
        before, folders = by_disk.get(disk, (0, []))
        by_disk[disk] = (before + size, [*folders, folder])
    for size, folders in by_disk.values():
        free = shutil.disk_usage(existing(folders[0])).free
        if size * ENOUGH > free:
            named = ", ".join(map(str, folders))
            yield (
                f"the disk of {named} has {free / 2**30:.2f} GiB free and the run writes about {size / 2**30:.2f} GiB; make room, keep "
                "fewer files (--save_last_n_epochs, --save_precision=fp16) or choose another --output_dir"
            )


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path.cwd())
