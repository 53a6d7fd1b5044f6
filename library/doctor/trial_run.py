"""One trial of the self test: a short training and one image, in a process of its own, since it may crash."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.doctor.installation import ROOT
from library.doctor.trials import Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray

BASE_MODEL = ROOT / "assets" / "base-model"
DATASET = ROOT / "assets" / "example" / "dataset.toml"
STEPS = 6
LAUNCHER = (
    "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--num_processes",
)  # fmt: skip
PROMPT = "a cat --w 64 --h 64 --s 8 --d 1 --l 4\n"


class TrialFailed(Exception):
    """A trial has no result. The message is the reason, in one line."""


class TrialTooLong(TrialFailed):
    """It had not ended when its time was over."""


@dataclass(frozen=True)
class Result:
    """The result of a trial. loss: on held-out images; image: (H, W, 3), levels 0 to 255; memory in GiB, None if unknown."""

    loss: float
    image: NDArray
    seconds_per_step: float
    memory: float | None


def run_trial(trial: Trial, folder: Path, seconds: float, base: Path = BASE_MODEL) -> Result:
    """Train in `folder`, which is made, for at most `seconds`. Raises TrialFailed."""
    folder.mkdir()
    (folder / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command(trial, base), cwd=folder, env=environment(trial), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TrialTooLong(f"stopped after {seconds:.0f} s") from None
        finally:
            end(process)
    text = output.read_text(encoding="utf-8", errors="replace")
    if code:
        raise TrialFailed(reason(text, code))
    return result(text, folder)


def command(trial: Trial, base: Path) -> list[str]:
    """The training, by the suite's own command line."""
    launcher = (*LAUNCHER, str(trial.processes)) if trial.processes > 1 else ()
    return [
        sys.executable, *launcher, str(ROOT / "train_network.py"), f"--pretrained_model_name_or_path={base}",
        f"--dataset_config={DATASET}", "--output_dir=.", "--output_name=trial", "--network_module=networks.lora",
        "--network_dim=8", "--network_alpha=8", "--learning_rate=2e-3", f"--max_train_steps={STEPS}", "--seed=1",
        "--max_data_loader_n_workers=0", "--validation_split=0.05", "--max_validation_steps=2",
        "--sample_prompts=prompt.txt", f"--sample_every_n_steps={STEPS}", *trial.arguments,
    ]  # fmt: skip


def environment(trial: Trial) -> dict[str, str]:
    """The environment of the training: nothing is downloaded, and no GPU is visible to a trial on the CPU."""
    without_gpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if trial.on_cpu else {}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", **without_gpu}


def end(process: subprocess.Popen) -> None:
    """Kill the process, and the processes that it started (by the launcher or the compiler)."""
    import psutil

    try:
        processes = [*psutil.Process(process.pid).children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in processes:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def reason(text: str, code: int) -> str:
    """Why a training ended with this exit code: its error line, else the last line, which ends a traceback."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return (errors or [f"{how}: {lines[-1]}" if lines else how])[0][:300]


def result(text: str, folder: Path) -> Result:
    """Read what a training printed and wrote. Raises TrialFailed if something is missing or is not finite."""
    import numpy as np
    from PIL import Image

    loss, speed, memory = (
        float(found[-1]) if (found := re.findall(pattern, text)) else None
        for pattern in (r"validation after step \d+: ([\w.]+)", r"speed +([\d.]+) s a step", r"peak memory +([\d.]+) GiB")
    )
    if loss is None or speed is None:
        raise TrialFailed("the training did not say its loss and speed")
    if not np.isfinite(loss):
        raise TrialFailed(f"the loss is {loss}")
    if not trained(folder / "trial.safetensors"):
        raise TrialFailed("the LoRA's weights did not change, or are not finite")
    images = sorted((folder / "sample").glob("*.png"))
    if not images:
        raise TrialFailed(next(iter(re.findall(r"sample \d+ failed: .+", text)), "no image was drawn"))
    with Image.open(images[-1]) as image:
        return Result(loss, np.asarray(image.convert("RGB"), dtype=np.float32), speed, memory)


def trained(lora: Path) -> bool:
    """Whether the matrices that start as zeros are finite, and at least one is no longer zero.

    Some have no gradient at 64 px: attention to a single position does not depend on query and key.
    """
    from library.formats.tensor_file import open_tensors

    with open_tensors(lora) as file:
        ups = [file.read(name) for name in file.shapes if name.endswith("lora_up.weight")]
    return any(bool(up.any()) for up in ups) and all(bool(up.isfinite().all()) for up in ups)
