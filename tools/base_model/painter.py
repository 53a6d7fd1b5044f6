"""The U-Net and the text encoder, trained together from nothing on the latents of the named images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.data.config import DatasetDefaults, datasets_from_file
from library.data.dataset import Batch, TrainingDataset
from library.diffusion.process import NoiseProcess, sample_timesteps
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.spec import PromptSpec
from library.models import sd1
from library.models.clip import encode_text, inner_text_model, load_tokenizer, text_config
from library.models.family import Model
from library.models.unet import unet_config
from library.models.vae import vae_fingerprint
from tools.base_model.names import STYLES, prompt_of
from tools.base_model.training import Average, Checkpoint, clip_and_step, rate_at

UNET_CHANNELS = (64, 128, 96, 64)
TEXT_WIDTH, TEXT_LAYERS = 128, 2
BATCH = 32
PEAK_RATE = 1.5e-3
EMA_DECAY = 0.998
READING_STEPS, READING_RATE = 700, 1e-3
LEAST, GAMMA = 0.5, 5.0
REPORT_EVERY, SHEET_EVERY = 100, 400
DRAWING = {"width": 64, "height": 64, "steps": 20, "scale": 4.0, "sampler": "ddim"}
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
class Painter:
    """What is trained, with the parts around it."""

    model: Model
    dataset: TrainingDataset
    process: NoiseProcess = NoiseProcess()

    def loss(self, batch: Batch, noise: Tensor, t: Tensor) -> Tensor:
        """The noise's mean squared error of each sample, (B,), not weighted."""
        latents = batch.latents * self.model.vae.config.scaling_factor
        context = encode_text(self.model.text_encoders[0], batch.tokens["ids"])
        noisy = self.process.add_noise(latents, noise, t)
        return (self.model.denoiser(noisy, t, encoder_hidden_states=context).sample - noise).square().flatten(1).mean(dim=1)


def new_painter(vae: torch.nn.Module, named: Path, seed: int) -> Painter:
    """A painter with random weights, and the dataset with its latents."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = unet_config(UNET_CHANNELS, context_width=TEXT_WIDTH)
    config["sample_size"] = 8  # latents of 64 pixels: the size that is drawn where nobody says another
    unet = UNet2DConditionModel.from_config(config)
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(text_config(TEXT_WIDTH, TEXT_LAYERS)))
    tokenizer = load_tokenizer()
    model = Model(sd1.FAMILY, {"unet": unet, "vae": vae, "text_encoder": text_encoder}, [tokenizer], "epsilon", "base model")
    dataset = TrainingDataset(datasets_from_file(dataset_file(named), DatasetDefaults()), seed=seed, tokenizers=[tokenizer])
    dataset.cache_latents(
        lambda images, _: vae.encode(images).latent_dist.mode(), batch_size=32, to_disk=False, fingerprint=vae_fingerprint(vae)
    )
    return Painter(model, dataset)


def dataset_file(named: Path) -> Path:
    """The dataset of all styles as a file of the kind that train_network.py reads."""
    path = named / "dataset.toml"
    subsets = "".join(f'\n  [[datasets.subsets]]\n  image_dir = "{style}"\n' for style in STYLES.values())
    path.write_text(DATASET.format(batch=BATCH) + subsets, encoding="utf-8")
    return path


def teach_reading(painter: Painter, steps: int) -> float:
    """Before the U-Net exists, the text encoder learns to tell a caption's latents, through one linear map of its mean output.

    A U-Net that knows nothing attends evenly to all 77 tokens, most of them padding: so it is given their mean. Starting from
    random outputs, which hardly differ between captions, it takes thousands of steps to notice the caption at all. Returns the
    last steps' mean squared error, where 1 is that of knowing nothing.
    """
    first = painter.dataset[1, 0].latents
    reader = torch.nn.Linear(TEXT_WIDTH, first[0].numel())
    parameters = [*painter.model.text_encoders[0].parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=READING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    error = 1.0
    for step in range(steps):
        epoch, position = divmod(step, painter.dataset.num_batches)
        batch = painter.dataset[epoch + 1, position]
        wanted = batch.latents * painter.model.vae.config.scaling_factor
        told = reader(encode_text(painter.model.text_encoders[0], batch.tokens["ids"]).mean(dim=1)).view_as(wanted)
        loss = (told - wanted).square().mean()
        loss.backward()
        clip_and_step(optimizer, rate_at(step, steps, READING_RATE, warm_up=50))
        error += 0.05 * (float(loss.detach()) - error)
    return error


def loss_weights(snr: Tensor) -> Tensor:
    """SNR within LEAST..GAMMA, over SNR: Min-SNR (Hang et al. 2023), but with more weight on nearly pure noise.

    There the caption alone says what to draw. Plain noise prediction hardly counts it: an error d of the image is an error
    sqrt(SNR) d of the noise.
    """
    return snr.clamp(LEAST, GAMMA) / snr


def train_painter(vae: torch.nn.Module, named: Path, work: Path, steps: int, seed: int = 1) -> Model:
    """The model with averaged weights after `steps` steps; goes on from the checkpoint in `work`."""
    painter = new_painter(vae, named, seed)
    parts = (painter.model.denoiser, painter.model.text_encoders[0])
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = Average(parts, EMA_DECAY)
    checkpoint = Checkpoint(work / "painter.pt", average, optimizer)
    averaged = Model(
        sd1.FAMILY,
        {"unet": average.averages[0], "vae": vae, "text_encoder": average.averages[1]},
        [painter.model.tokenizers[0]],
        "epsilon",
        "base model",
    )
    first, started, total = checkpoint.load(), time.time(), 0.0
    if first == 0:
        print(f"the text encoder reads with an error of {teach_reading(painter, READING_STEPS):.3f}", flush=True)
        average.averages[1].load_state_dict(painter.model.text_encoders[0].state_dict())
    for part in parts:
        part.train()
    for step in range(first, steps):
        epoch, position = divmod(step, painter.dataset.num_batches)
        batch = painter.dataset[epoch + 1, position]
        t = sample_timesteps(len(batch.paths), torch.device("cpu"))
        losses = painter.loss(batch, torch.randn_like(batch.latents), t)
        (losses * loss_weights(painter.process.snr()[t])).mean().backward()
        clip_and_step(optimizer, rate_at(step, steps, PEAK_RATE))
        average.update(step)
        total += losses.detach().mean()
        done = step + 1
        if done % REPORT_EVERY == 0 or done == steps:
            speed = (done - first) * BATCH / (time.time() - started)
            print(
                f"{time.strftime('%H:%M:%S')} U-Net step {done}/{steps}: loss {float(total) / REPORT_EVERY:.4f}, "
                f"validation {validation_loss(Painter(averaged, painter.dataset)):.4f}, {speed:.1f} images/s",
                flush=True,
            )
            total = 0.0
            checkpoint.save(done)
        if done % SHEET_EVERY == 0 or done == steps:
            draw_sheet(averaged, work / f"sheet-{done:06d}.png")
    zero_unused_tokens(averaged, painter.dataset)
    return averaged


@torch.no_grad()
def validation_loss(painter: Painter, batches: int = 4) -> float:
    """The loss on the same noise and timesteps every time; timesteps evenly spread."""
    generator = torch.Generator().manual_seed(7)
    losses = []
    for position in range(min(batches, painter.dataset.num_batches)):
        batch = painter.dataset[1, position]
        noise = torch.randn(batch.latents.shape, generator=generator)
        t = torch.linspace(20, 999, len(batch.paths)).long()
        losses.append(painter.loss(batch, noise, t).mean())
    return float(torch.stack(losses).mean())


def draw_sheet(model: Model, path: Path) -> None:
    """Sixteen names in the three styles, one row a style."""
    from PIL import Image

    specs = [
        PromptSpec(prompt=prompt_of(style, name), seed=i, **DRAWING) for style in STYLES for i, name in enumerate(SHEET_NAMES)
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
