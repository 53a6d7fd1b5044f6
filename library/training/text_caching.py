"""Encoding all captions before training, so that a step needs no text encoder."""

from __future__ import annotations

import json

import torch

from library.data.dataset import MAX_CAPTIONS_IN_MEMORY, TrainingDataset
from library.data.text_cache import DiskTexts, MemoryTexts, keep_in_memory, keep_on_disk
from library.models.clip import tokenize
from library.models.family import Conditioning, Model
from library.models.modules import evaluating, weights_fingerprint
from library.training.machine import Machine
from library.training.network import TrainedNetwork
from library.training.options import TrainNetworkOptions


def cache_text(
    options: TrainNetworkOptions, datasets: list[TrainingDataset], model: Model, network: TrainedNetwork, machine: Machine
) -> None:
    """Encode all captions once, if the text encoders are not trained and each caption has few variants.

    Without an option this is done only if all of them fit into memory.
    """
    captions = options.captions
    if network.trains_text_encoder:
        return
    limit = None if captions.caches_text else MAX_CAPTIONS_IN_MEMORY
    found = [dataset.possible_captions(limit) for dataset in datasets]
    folders = {caption: folder for variants in found for caption, folder in (variants or {}).items()}
    if None in found:
        return
    dtype = model.text_encoders[0].dtype

    @torch.no_grad()
    def encode(text: str) -> Conditioning:
        tokens = tokenize(model.tokenizers, [text], captions.max_token_length, captions.weighted_captions)
        with machine.autocast(), evaluating(network.module):
            return model.encode_text(tokens, options.model.clip_skip).to("cpu", dtype)

    if captions.cache_text_encoder_outputs_to_disk:
        texts: MemoryTexts | DiskTexts = keep_on_disk(
            folders, encode, fingerprint=text_fingerprint(options, model, network),
            shapes=model.family.text.shapes(model, captions.tokens),
            share=(machine.processes.rank, machine.processes.world), wait=machine.processes.wait,
        )  # fmt: skip
    else:
        texts = keep_in_memory(folders, encode)
    for dataset in datasets:
        dataset.texts = texts


def text_fingerprint(options: TrainNetworkOptions, model: Model, network: TrainedNetwork) -> str:
    """Everything that the encoding of a caption depends on: weights, arithmetic, tokenizers and options."""
    captions, chosen = options.captions, options.network
    settings = [captions.max_token_length, captions.weighted_captions, options.model.clip_skip, options.training.mixed_precision]
    paddings = [tokenizer.pad_token_id for tokenizer in model.tokenizers]
    # Weights from --network_weights on the text encoder change its output even if they are not trained; a new network does not.
    is_attached = chosen.network_weights and not chosen.network_train_unet_only
    weights = weights_fingerprint(*model.text_encoders, *([network.module] if is_attached else []))
    return json.dumps([weights, paddings, settings])
