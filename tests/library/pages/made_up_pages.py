"""Pages for the browser tests: a run that is made up, a real dataset of a few images, a sheet of plain images."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingDataset
from library.data.dataset_page import write_dataset_page
from library.data.tokens import CaptionTokenizer
from library.generation.outputs.comparison import Comparison, columns_of
from library.generation.outputs.sheet_page import write_sheet_page
from library.generation.prompts.spec import PromptSpec
from library.models.clip import load_tokenizer
from library.pages.chart_script import copy_chart_script
from library.pages.images import save_small_copy
from library.pages.page import folder_of, write_page

NASTY = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def write_run_page(path: Path, **changes) -> Path:
    """The page of a run in the middle, or what `changes` make of it."""
    write_page(path, "run", "mine", run_data(path, **changes))
    return path


def run_data(page: Path, **changes) -> dict:
    folder = folder_of(page)
    folder.mkdir(exist_ok=True)
    for step in (0, 100, 200):
        save_small_copy(Image.new("RGB", (64, 64), (step, 90, 200)), folder / f"sample-{step}.webp", 640)
    steps = list(range(1, 201))
    losses = [0.3 - step / 1000 for step in steps]
    prompt = {"text": NASTY, "negative": "", "size": [64, 64], "seed": 1, "steps": 8, "scale": 4.0, "sampler": "ddim"}
    images = {step: {0: [f"{folder.name}/sample-{step}.webp", f"sample/{step}.png"]} for step in (0, 100, 200)}
    example = {"src": f"{folder.name}/sample-0.webp", "caption": NASTY, "file": "a b#.png", "size": [64, 64]}
    dataset = {"number": 1, "size": [64, 64], "batch": 1, "images": 8, "reg": 0, "held_out": 0, "buckets": [[64, 64, 8, 8]],
               "subsets": [{"folder": NASTY, "images": 8, "repeats": 1, "reg": False}]}  # fmt: skip
    return {
        "name": NASTY, "lora": "mine.safetensors", "model": "base", "model_title": "SD 1.x", "base": "base",
        "network": "networks.lora",
        "trigger": "", "began": 0, "chart": copy_chart_script(folder), "secrets": [], "command": f"train {NASTY}",
        "data": {"datasets": [dataset], "tags": [[NASTY, 3]], "examples": [example],
                 "tokens": {"limit": 75, "counted": 8, "images": 8, "longest": 9, "cut": 0, "ranges": [[0, 4, 2], [5, 9, 6]]}},
        "settings": [{"group": "g", "name": "training_comment", "value": NASTY, "default": "", "help": "text"}],
        "step": 200, "steps": 400, "epoch": 1, "epochs": 2, "speed": 0.5, "left": 100.0, "seconds": 100.0, "average": 0.2,
        "skipped": 0, "memory": None, "best": [200, 0.2], "validation": [[100, 0.25], [200, 0.2]], "raw": [steps, losses],
        "mean": [steps, losses], "batches": 200, "smoothing": 20, "parts": [],
        "rates": [{"names": ["unet"], "curve": [[1, 200], [0.001, 0.0]]}], "state": "running", "reason": "", "every": 0.3,
        "written": 4102444800000, "warnings": [NASTY], "samples": {"prompts": [prompt], "steps": [0, 100, 200], "images": images},
        "files": [{"name": "mine-best.safetensors", "step": 200, "bytes": 1000, "loss": 0.2, "best": True}], **changes,
    }  # fmt: skip


def write_data_page(path: Path, count: int = 6) -> Path:
    """The page of a dataset: a long, an empty and a hostile caption, a file that is there twice, masks, captions that vary."""
    images, masks = path.parent / "images <b>", path.parent / "masks"
    images.mkdir()
    masks.mkdir()
    for number in range(count):
        size = (128, 64) if number == 1 else (64, 64)
        Image.new("RGB", size, (250 - 7 * number % 250, 90, 60)).save(images / f"{number} #.png")
        Image.new("L", size, 255 if number else 0).save(masks / f"{number} #.png")
        (images / f"{number} #.txt").write_text(f"cat {number}, grey, striped, asleep", encoding="utf-8")
    (images / "1 #.txt").write_text(", ".join(f"word{number}" for number in range(60)), encoding="utf-8")
    (images / "2 #.txt").write_text("\n", encoding="utf-8")
    (images / "3 #.txt").write_text(NASTY, encoding="utf-8")
    shutil.copy(images / "4 #.png", images / "5 #.png")
    subset = SubsetConfig(
        image_dir=images, conditioning_data_dir=masks, caption_extension=".txt", shuffle_caption=True, num_repeats=2
    )  # fmt: skip
    write_dataset_page(
        TrainingDataset(
            [DatasetConfig(resolution=64, subsets=(subset,))], seed=1, tokenizer=CaptionTokenizer([load_tokenizer()])
        ),
        path,
    )
    return path


def write_comparison_page(path: Path) -> Path:
    """The page of a sheet: two prompts and seeds, the model alone and a LoRA at two strengths; one image was not drawn."""
    comparison = Comparison(columns_of(["my lora.safetensors"], [], [0, 0.5, 1]))
    rows = [PromptSpec(prompt, seed=seed, negative_prompt="blurry") for prompt in ("a cat", NASTY) for seed in (1, 2)]
    for index, _ in enumerate(comparison.specs(rows)):
        if index != 7:
            image = Image.new("RGB", (300, 200), (20 * index, 120, 90))
            comparison.add(index, image)
            comparison.files[index] = path.parent / f"im #{index}.png"
            image.save(comparison.files[index])
    write_sheet_page(comparison, "base", path)
    return path
