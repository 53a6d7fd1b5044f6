"""Whether the files that a run is going to write fit on their disks."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from library.data.cache import FOLDER as LATENTS
from library.data.dataset import TrainingDataset
from library.data.text_cache import FOLDER as TEXTS
from library.models.loading import Header
from library.training.checks.estimates import encoded_text_bytes, file_sizes
from library.training.memory.precision import NumberFormats
from library.training.options import OutputOptions, TrainNetworkOptions
from library.training.outputs.saving import ModelFiles
from library.training.plan import Plan

ENOUGH = 1.1  # times the space that the files need


def space_needed(options: TrainNetworkOptions, plan: Plan, dataset: TrainingDataset, header: Header) -> dict[Path, int]:
    """Bytes that the run is about to write, by folder."""
    output, state, size = options.output, options.state, file_sizes(options, header)
    epochs, steps = saves(output, plan)
    files = 1 + at_once(epochs, output.save_last_n_epochs) + at_once(steps, steps_kept(output, output.save_last_n_steps))
    files += bool(dataset.table.held_out.any())  # the best one
    states = 0
    if state.save_state:
        kept = steps_kept(output, state.save_last_n_steps_state or output.save_last_n_steps)
        states += at_once(epochs, state.save_last_n_epochs_state or output.save_last_n_epochs) + at_once(steps, kept)
    states += state.save_state or state.save_state_on_train_end
    needed = {output.folder: files * size.network + states * size.state}
    caches: list[tuple[Path, int]] = []
    if options.augmentation.cache_latents_to_disk:
        caches += latents_to_write(dataset)
    if options.captions.cache_text_encoder_outputs_to_disk:
        formats = NumberFormats.of(options.training, options.precision)
        caches += texts_to_write(dataset, encoded_text_bytes(options.captions.tokens, formats, header))
    for folder, count in caches:
        needed[folder] = needed.get(folder, 0) + count
    return needed


def latents_to_write(dataset: TrainingDataset) -> Iterable[tuple[Path, int]]:
    """Folders of images, and the bytes of the latents that are still to be kept there."""
    table = dataset.table
    for subset in table.subsets:
        rows = range(subset.start, subset.end)
        used = (table.bucket_size(row) for row in rows if table.repeats[row] or table.held_out[row])
        positions = sum(math.prod(dataset.latent_space.size(*size)) for size in used)
        size = positions * dataset.latent_space.channels * 4 * (2 if subset.config.flip_aug else 1)  # float32
        yield subset.config.image_dir, max(0, size - bytes_in(subset.config.image_dir / LATENTS))


def texts_to_write(dataset: TrainingDataset, bytes_each: int) -> Iterable[tuple[Path, int]]:
    """Folders of images, and the bytes of the encoded captions that are still to be kept there."""
    datasets = [one for one in (dataset, dataset.validation()) if one is not None]
    folder_of = {caption: folder for one in datasets for caption, folder in (one.possible_captions(limit=None) or {}).items()}
    for folder, captions in Counter(folder_of.values()).items():
        yield folder, max(0, captions * bytes_each - bytes_in(folder / TEXTS))


def saves(output: OutputOptions, plan: Plan) -> tuple[int, int]:
    """How often the run saves after an epoch, and after a step, the end apart."""
    by_epoch, by_step = ModelFiles(output).epoch_interval(plan.epochs), output.save_every_n_steps
    return (plan.epochs - 1) // by_epoch if by_epoch else 0, plan.max_steps // by_step if by_step else 0


def steps_kept(output: OutputOptions, steps: int | None) -> int | None:
    """How many saves lie there at a time, if those older than `steps` are removed."""
    interval = output.save_every_n_steps
    return steps // interval + 1 if steps and interval else None


def at_once(saved: int, kept: int | None) -> int:
    """How many of the saved are there at one time: a new one is written before an old one goes."""
    return min(saved, kept + 1) if kept else saved


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
                f"the disk of {named} has {_amount(free)} free and the run writes about {_amount(size)}; "
                "make room, keep fewer files (--save_last_n_epochs, --save_last_n_epochs_state, --save_precision=fp16), "
                "cache in memory (--cache_latents, --cache_text_encoder_outputs) or choose another --output_dir"
            )


def _amount(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def bytes_in(folder: Path) -> int:
    """Size of the files lying directly in a folder, which need not be there."""
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()) if folder.is_dir() else 0


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path.cwd())
