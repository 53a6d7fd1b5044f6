"""The datasets of a run, as its options say: first their settings, then the images themselves."""

from __future__ import annotations

from pathlib import Path

from library.data.config import datasets_from_file, datasets_from_folders, datasets_from_metadata
from library.data.config_keys import DatasetConfig, DatasetDefaults
from library.data.dataset import TrainingDataset
from library.data.masks import check_masks
from library.data.tokens import CaptionTokenizer
from library.errors import UserError
from library.models.clip import load_tokenizer
from library.models.family import Family
from library.training.options import TrainNetworkOptions


def dataset_defaults(options: TrainNetworkOptions) -> DatasetDefaults:
    """What the command line says about datasets, for every key that a dataset file leaves open."""
    given = {
        **options.data.model_dump(),
        **options.captions.model_dump(),
        **options.augmentation.model_dump(),
        **options.validation.model_dump(),
    }
    given |= {"batch_size": given["train_batch_size"], "num_repeats": given["dataset_repeats"]}
    if given["caption_extention"]:
        given["caption_extension"] = given["caption_extention"]
    return DatasetDefaults(**{key: value for key, value in given.items() if key in DatasetDefaults.model_fields})


def dataset_configs(options: TrainNetworkOptions) -> list[DatasetConfig]:
    """The settings of all datasets; folders are looked into, no image is read. Raises UserErrors with all that is wrong."""
    data, defaults = options.data, dataset_defaults(options)
    if data.dataset_config:
        configs = datasets_from_file(Path(data.dataset_config), defaults)
        ignored = [name for name in ("train_data_dir", "reg_data_dir", "in_json") if getattr(data, name)]
        if ignored:
            print(f"--dataset_config is given, so --{' and --'.join(ignored)} is not used")
    elif data.in_json:
        configs = datasets_from_metadata(Path(data.in_json), Path(data.train_data_dir) if data.train_data_dir else None, defaults)
    elif data.train_data_dir:
        reg, masks = (Path(folder) if folder else None for folder in (data.reg_data_dir, data.conditioning_data_dir))
        configs = datasets_from_folders(Path(data.train_data_dir), reg, defaults, masks)
    else:
        raise UserError("no images: give --dataset_config or --train_data_dir")
    check_masks(configs, options.loss.masked_loss)
    return configs


def open_dataset(options: TrainNetworkOptions, configs: list[DatasetConfig], seed: int, family: Family) -> TrainingDataset:
    """Index the images; of the model only its family is needed for that."""
    tokenizers, captions = [load_tokenizer(padding) for padding in family.text.paddings], options.captions
    return TrainingDataset(
        configs,
        seed=seed,
        tokenizer=CaptionTokenizer(tokenizers, captions.max_token_length, captions.weighted_captions),
        latent_space=family.latents,
        prior_loss_weight=options.data.prior_loss_weight,
        gradient_accumulation_steps=options.training.gradient_accumulation_steps,
        on_bad_image=options.data.on_bad_image,
    )
