"""The U-Net and the text encoder, trained together from nothing on the latents of the named images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from assets.make.names import STYLES, prompt_of
from assets.make.training import Average, Checkpoint, clip_and_step, rate_at
from library.data.config import datasets_from_file
from library.data.config_keys import DatasetDefaults
from library.data.dataset import Batch, TrainingDataset
from library.data.tokens import CaptionTokenizer
from library.diffusion.process import NoiseProcess, sample_timesteps
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.spec import PromptSpec
from library.models import sd1
from library.models.clip import encode_text, inner_text_model, load_tokenizer, text_config
from library.models.family import Model
from library.models.modules import weights_fingerprint
from library.models.unet import unet_config

UNET_CHANNELS = (64, 128, 96, 64)
TEXT_WIDTH, TEXT_LAYERS = 128, 2
BATCH = 32
PEAK_RATE = 1.5e-3
EMA_DECAY = 0.998
TEXT_ENCODER_STEPS, TEXT_ENCODER_RATE = 700, 1e-3
LEAST, GAMMA = 0.5, 5.0
REPORT_EVERY, SHEET_EVERY = 100, 400
SAMPLING = {"width": 64, "height": 64, "steps": 20, "scale": 4.0, "sampler": "ddim"}
SHEET_NAMES = ("cat face", "penguin", "octopus", "sunflower", "banana", "pizza", "doughnut", "birthday cake")
SHEET_NAMES += ("guitar", "key", "umbrella", "camera", "rocket", "sailboat", "castle", "rainbow")

DATASET = """
[general]
caption_extension = ".txt"
keep_tokens = 1                 # the prompt itself; the keywords behind it come and go
shuffle_caption = true
caption_tag_dropout_rate = 0.7
caption_dropout_rate = 0.1      # empty captions, for guidance

[[datasets]]
resolution = 64
batch_size = {batch}
"""


@dataclass
class DiffusionTraining:
    """The model that is trained, what it is trained on, and its loss."""

    model: Model
    dataset: TrainingDataset
    process: NoiseProcess = NoiseProcess()

    def loss(self, batch: Batch, noise: Tensor, t: Tensor) -> Tensor:
        """The noise's mean squared error of each sample, (B,), not weighted."""
        latents = batch.latents * self.model.vae.config.scaling_factor
        context = encode_text(self.model.text_encoders[0], batch.tokens["ids"])
        noisy = self.process.add_noise(latents, noise, t)
        return (self.model.denoiser(noisy, t, encoder_hidden_states=context).sample - noise).square().flatten(1).mean(dim=1)


def new_training(vae: torch.nn.Module, named: Path, seed: int) -> DiffusionTraining:
    """U-Net and text encoder with random weights, and the dataset with its latents."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = unet_config(UNET_CHANNELS, context_width=TEXT_WIDTH)
    config["sample_size"] = 8  # latents of 64 pixels: the size that pipelines generate by default
    unet = UNet2DConditionModel.from_config(config)
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(text_config(TEXT_WIDTH, TEXT_LAYERS)))
    tokenizer = load_tokenizer()
    model = Model(sd1.FAMILY, {"unet": unet, "vae": vae, "text_encoder": text_encoder}, [tokenizer], "epsilon", "base model")
    configs = datasets_from_file(dataset_file(named), DatasetDefaults())
    dataset = TrainingDataset(configs, seed=seed, tokenizer=CaptionTokenizer([tokenizer]))
    dataset.cache_latents(
        lambda images, _: vae.encode(images).latent_dist.mode(),
        batch_size=32,
        to_disk=False,
        fingerprint=weights_fingerprint(vae),
    )
    return DiffusionTraining(model, dataset)


def dataset_file(named: Path) -> Path:
    """The dataset of all styles as a file of the kind that train_network.py reads."""
    path = named / "dataset.toml"
    subsets = "".join(f'\n  [[datasets.subsets]]\n  image_dir = "{style}"\n' for style in STYLES.values())
    path.write_text(DATASET.format(batch=BATCH) + subsets, encoding="utf-8")
    return path


def pretrain_text_encoder(training: DiffusionTraining, steps: int) -> float:
    """Train the text encoder, before the U-Net, to predict a caption's latents from the mean of its outputs by a linear map.

    The mean, because an untrained U-Net attends evenly to all 77 tokens, most of them padding. Without this the outputs of
    different captions hardly differ, and the U-Net takes thousands of steps to follow the caption at all. Returns the mean
    squared error of the last steps; the mean latents alone give 1.
    """
    first = training.dataset[1, 0].latents
    to_latents = torch.nn.Linear(TEXT_WIDTH, first[0].numel())
    parameters = [*training.model.text_encoders[0].parameters(), *to_latents.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TEXT_ENCODER_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    error = 1.0
    for step in range(steps):
        epoch, position = divmod(step, training.dataset.num_batches)
        batch = training.dataset[epoch + 1, position]
        wanted = batch.latents * training.model.vae.config.scaling_factor
        predicted = to_latents(encode_text(training.model.text_encoders[0], batch.tokens["ids"]).mean(dim=1)).view_as(wanted)
        loss = (predicted - wanted).square().mean()
        loss.backward()
        clip_and_step(optimizer, rate_at(step, steps, TEXT_ENCODER_RATE, warm_up=50))
        error += 0.05 * (float(loss.detach()) - error)
    return error


def loss_weights(snr: Tensor) -> Tensor:
    """SNR within LEAST..GAMMA, over SNR: Min-SNR (Hang et al. 2023), but with more weight on nearly pure noise.

    There the prediction depends on the caption alone. The plain loss hardly counts it: an error d of the image is an error
    sqrt(SNR) d of the noise.
    """
    return snr.clamp(LEAST, GAMMA) / snr


def train_diffusion(vae: torch.nn.Module, named: Path, work: Path, steps: int, seed: int = 1) -> Model:
    """The model with averaged weights after `steps` steps; goes on from the checkpoint in `work`."""
    training = new_training(vae, named, seed)
    parts = (training.model.denoiser, training.model.text_encoders[0])
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = Average(parts, EMA_DECAY)
    checkpoint = Checkpoint(work / "diffusion.pt", average, optimizer)
    averaged = Model(
        sd1.FAMILY,
        {"unet": average.averages[0], "vae": vae, "text_encoder": average.averages[1]},
        [training.model.tokenizers[0]],
        "epsilon",
        "base model",
    )
    first, started, total = checkpoint.load(), time.time(), 0.0
    if first == 0:
        print(f"text encoder alone: mean squared error {pretrain_text_encoder(training, TEXT_ENCODER_STEPS):.3f}", flush=True)
        average.averages[1].load_state_dict(training.model.text_encoders[0].state_dict())
    for part in parts:
        part.train()
    for step in range(first, steps):
        epoch, position = divmod(step, training.dataset.num_batches)
        batch = training.dataset[epoch + 1, position]
        t = sample_timesteps(len(batch.paths), torch.device("cpu"))
        losses = training.loss(batch, torch.randn_like(batch.latents), t)
        (losses * loss_weights(training.process.snr()[t])).mean().backward()
        clip_and_step(optimizer, rate_at(step, steps, PEAK_RATE))
        average.update(step)
        total += losses.detach().mean()
        done = step + 1
        if done % REPORT_EVERY == 0 or done == steps:
            speed = (done - first) * BATCH / (time.time() - started)
            print(
                f"{time.strftime('%H:%M:%S')} U-Net step {done}/{steps}: loss {float(total) / REPORT_EVERY:.4f}, "
                f"validation {validation_loss(DiffusionTraining(averaged, training.dataset)):.4f}, {speed:.1f} images/s",
                flush=True,
            )
            total = 0.0
            checkpoint.save(done)
        if done % SHEET_EVERY == 0 or done == steps:
            draw_sheet(averaged, work / f"sheet-{done:06d}.png")
    zero_unused_tokens(averaged, training.dataset)
    return averaged


@torch.no_grad()
def validation_loss(training: DiffusionTraining, batches: int = 4) -> float:
    """The loss on the same noise and timesteps every time; timesteps evenly spread."""
    generator = torch.Generator().manual_seed(7)
    losses = []
    for position in range(min(batches, training.dataset.num_batches)):
        batch = training.dataset[1, position]
        noise = torch.randn(batch.latents.shape, generator=generator)
        t = torch.linspace(20, 999, len(batch.paths)).long()
        losses.append(training.loss(batch, noise, t).mean())
    return float(torch.stack(losses).mean())


def draw_sheet(model: Model, path: Path) -> None:
    """Sixteen names in the three styles, one row a style."""
    from PIL import Image

    specs = [
        PromptSpec(prompt=prompt_of(style, name), seed=i, **SAMPLING) for style in STYLES for i, name in enumerate(SHEET_NAMES)
    ]
    images = [made.image for made in Pipeline(model, GenerateSettings(batch_size=16)).generate(specs)]
    sheet = Image.new("RGB", (64 * len(SHEET_NAMES), 64 * len(STYLES)))
    for i, image in enumerate(images):
        row, column = divmod(i, len(SHEET_NAMES))
        sheet.paste(image, (64 * column, 64 * row))
    sheet.save(path)


@torch.no_grad()
def zero_unused_tokens(model: Model, dataset: TrainingDataset) -> None:
    """Clear the embeddings of tokens that no caption has, which training never touched, so that the file packs small."""
    used = {token for ids in model.tokenizers[0]([*dataset.table.captions, ""]).input_ids for token in ids}
    table = inner_text_model(model.text_encoders[0]).embeddings.token_embedding.weight
    unused = torch.ones(len(table), dtype=torch.bool)
    unused[list(used)] = False
    table[unused] = 0
