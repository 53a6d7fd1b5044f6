"""One DyLoRA run against a LoRA run for each of its ranks: seconds a step, and the validation loss of each extracted rank.

    python benchmarks/dylora.py [--base trained|seeded] [--steps 200] [--seeds 3] [--jobs 2] [--speed-only] [--out FILE]

The model is the small seeded one. With `--base trained` its U-Net first learns the example images (all weights, --base-steps
steps), and the LoRAs then learn the same images with inverted colours: as in practice, a LoRA changes a model that can
already draw. With `--base seeded` the LoRAs learn the images on the random model itself. Every fifth image is for
validation, with noise and timesteps that are the same for all. Each LoRA has alpha = rank, the DyLoRA alpha = 16 of rank 16,
so all have scale 1; all have the same batches, rates and number of steps. Only the U-Net is trained.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from library.diffusion.process import NoiseProcess
from library.formats.low_rank import LowRank, split
from library.models.clip import encode_text, tokenize
from library.testing import small_stable_diffusion
from networks import dylora, lora

IMAGES = Path(__file__).resolve().parents[1] / "assets" / "example" / "lineart"
RANKS, UNIT, BATCH, SIZE = (4, 8, 12, 16), 4, 4, 64
PROCESS = NoiseProcess()


class Task:
    """A U-Net, the latents and texts of images, and the loss on them."""

    def __init__(self) -> None:
        model = small_stable_diffusion(unet_channels=(64, 64), vae_channels=(32, 32, 32, 32), text_layers=1)
        self.unet = model.denoiser
        files = sorted(IMAGES.glob("*.webp"))
        images = torch.stack([_image(file) for file in files])
        captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
        with torch.no_grad():
            self.texts = encode_text(model.text_encoders[0], tokenize(model.tokenizers, captions)["ids"])
            self.plain, self.inverted = (_latents(model.vae, sign * images) for sign in (1, -1))
        self.latents = self.plain
        self.validation = torch.arange(0, len(files), 5)
        self.training = torch.tensor([i for i in range(len(files)) if i % 5])

    def loss(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        z, noise = self.latents[chosen], torch.randn(len(chosen), *self.latents.shape[1:], generator=generator)
        t = torch.randint(0, PROCESS.timesteps, (len(chosen),), generator=generator)
        prediction = self.unet(PROCESS.add_noise(z, noise, t), t, encoder_hidden_states=self.texts[chosen]).sample
        return (prediction.float() - noise.float()).square().mean()

    @torch.no_grad()
    def validation_loss(self) -> float:
        generator = torch.Generator().manual_seed(5)
        return statistics.mean(self.loss(self.validation, generator).item() for _ in range(8))

    def train(self, parameters: list[dict], steps: int, seed: int, network: nn.Module | None = None) -> None:
        """AdamW, its rate falling like a cosine, gradients cut to norm 1: the same batches and noise for the same seed."""
        optimizer = torch.optim.AdamW(parameters, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(1000 + seed)
        for step in range(steps):
            if hasattr(network, "on_step_start"):
                torch.manual_seed(1000 * seed + step)
                network.on_step_start()
            chosen = self.training[torch.randint(0, len(self.training), (BATCH,), generator=generator)]
            self.loss(chosen, generator).backward()
            torch.nn.utils.clip_grad_norm_([p for group in parameters for p in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def learn_base(self, steps: int) -> None:
        """Teach the U-Net itself the images as they are; the task is then the inverted ones."""
        weights = list(self.unet.parameters())
        self.unet.requires_grad_(True)
        self.train([{"params": weights, "lr": 1e-3}], steps, seed=99)
        self.unet.requires_grad_(False)
        self.latents = self.inverted


def _image(file: Path) -> Tensor:
    image = Image.open(file).convert("RGB").resize((SIZE, SIZE))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _latents(vae: nn.Module, images: Tensor) -> Tensor:
    torch.manual_seed(0)
    return torch.cat([vae.encode(part).latent_dist.sample() for part in images.split(30)]) * vae.config.scaling_factor


def make(task: Task, kind: str, rank: int, seed: int, rate: float) -> tuple[lora.LoRANetwork, list[dict]]:
    """A network that is attached to the U-Net, and its parameter groups."""
    torch.manual_seed(seed)
    words = {"unit": str(UNIT)} if kind == "dylora" else {}
    network = (dylora if kind == "dylora" else lora).create_network(1.0, rank, rank, None, None, task.unet, **words)
    network.apply_to(None, task.unet)
    network.train()
    return network, network.prepare_optimizer_params(None, None, rate)[0]


def extracted(task: Task, network: dylora.DyLoRANetwork, rank: int) -> lora.LoRANetwork:
    """The LoRA of this rank that the extraction tool would write, attached."""
    state, weights = network.file_weights(), {}
    for name in [module.lora_name for module in network.loras]:
        whole = LowRank(state[f"{name}.lora_up.weight"], state[f"{name}.lora_down.weight"], state[f"{name}.alpha"].item())
        part = split(whole, rank)
        weights |= {f"{name}.lora_up.weight": part.up, f"{name}.lora_down.weight": part.down}
        weights[f"{name}.alpha"] = torch.tensor(part.alpha)
    result, weights = lora.create_network_from_weights(1.0, None, None, None, task.unet, weights)
    result.eval().load_state_dict(weights)
    result.apply_to(None, task.unet)
    return result


def one_seed(seed: int, base: dict[str, Tensor], inverted: bool, steps: int, rate: float) -> dict[str, dict[int, float]]:
    """Validation losses by rank, of LoRAs and of the DyLoRA's extracted ranks."""
    torch.set_num_threads(1)
    task = Task()
    task.unet.load_state_dict(base)
    task.latents = task.inverted if inverted else task.plain
    losses: dict[str, dict[int, float]] = {"lora": {}, "dylora": {}}
    for rank in RANKS:
        network, groups = make(task, "lora", rank, seed, rate)
        task.train(groups, steps, seed, network)
        losses["lora"][rank] = task.validation_loss()
        network.unapply()
    network, groups = make(task, "dylora", max(RANKS), seed, rate)
    task.train(groups, steps, seed, network)
    network.unapply()
    for rank in RANKS:
        part = extracted(task, network, rank)
        losses["dylora"][rank] = task.validation_loss()
        part.unapply()
    return losses


def speed(task: Task, rounds: int, steps: int = 4) -> float:
    """Processor seconds a step of a DyLoRA run over those of a LoRA run, rank 16: the median over interleaved rounds.

    Both runs go through all ranks of the DyLoRA equally often, so that the draws do not decide.
    """
    ratios = []
    for number in range(rounds + 1):
        seconds = {}
        for kind in ("lora", "dylora") if number % 2 else ("dylora", "lora"):
            network, groups = make(task, kind, max(RANKS), 0, 1e-4)
            if kind == "dylora":
                network.on_step_start = partial(_use_next, network, iter(RANKS * (steps // len(RANKS))))
            started = time.process_time()
            task.train(groups, steps, 0, network)
            seconds[kind] = time.process_time() - started
            network.unapply()
        if number:  # the first round warms up
            ratios.append(seconds["dylora"] / seconds["lora"])
    return statistics.median(ratios)


def _use_next(network: dylora.DyLoRANetwork, ranks: Iterator[int]) -> None:
    network.use_rank(next(ranks))


def table(losses: list[dict[str, dict[int, float]]], without: float) -> list[str]:
    """A row for each rank: mean losses over the seeds, how much higher the DyLoRA's is, and its share of what the LoRA gained."""
    lines = ["| rank | LoRA of that rank | extracted from the DyLoRA | difference | share of the LoRA's gain |"]
    lines.append("| ---: " * 5 + "|")
    for rank in RANKS:
        alone, part = (statistics.mean(run[kind][rank] for run in losses) for kind in ("lora", "dylora"))
        gain = (without - part) / (without - alone)
        lines.append(f"| {rank} | {alone:.4f} | {part:.4f} | {100 * (part / alone - 1):+.1f} % | {100 * gain:.0f} % |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=("trained", "seeded"), default="trained")
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=40, help="of the speed measurement; 0: leave it out")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = Task()
    conditions = (
        f"{options.base} base, {options.steps} steps of {BATCH}, rate {options.rate:g} falling like a cosine, "
        f"mean of {options.seeds} seeds; torch {torch.__version__}, one thread of {platform.processor() or platform.machine()}"
    )
    lines = ["# DyLoRA against LoRAs of its ranks", "", f"{conditions}. By `python {' '.join(sys.argv)}`.", ""]
    if options.rounds:
        ratio = speed(task, options.rounds)
        lines.append(f"DyLoRA of rank 16, unit 4: {ratio:.2f} x the processor time a step of a LoRA of rank 16.")
        print(lines[-1], flush=True)
    if not options.speed_only:
        if options.base == "trained":
            task.learn_base(options.base_steps)
        without = task.validation_loss()
        lines += ["", f"Validation loss without a LoRA: {without:.4f}", ""]
        print(lines[-2], flush=True)
        arguments = (task.unet.state_dict(), options.base == "trained", options.steps, options.rate)
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            losses = [done.result() for done in [pool.submit(one_seed, seed, *arguments) for seed in range(options.seeds)]]
        lines += [*table(losses, without), "", f"Each seed: `{json.dumps(losses)}`"]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
