"""A step never asks the device for a number, and leaves no tensor where it does not belong.

Here runs are set up on torch's `meta` device, whose tensors have shapes and no numbers: reading one (`.item()`, `if tensor:`,
`nonzero`), bringing one to the CPU and mixing it with tensors of the CPU all raise. On a GPU the first two would wait for all
work that is queued, at every step.

It is the second type of device that these tests have. A made-up one (torch's `PrivateUse1`, registered from Python) would need a
kernel of our own for every operation, already for `torch.empty`; `meta` has all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from small_runs import copy_of_two_blocks, image_folder, use_two_blocks, words_of_a_run

from library.models.family import Model
from library.training import setup
from library.training.batch_loss import BatchLoss
from library.training.checks.preflight import preflight
from library.training.machine import Machine
from library.training.options import parse_options
from library.training.outputs.tracking import LossRecord
from library.training.setup import Run

META = torch.device("meta")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = image_folder(tmp_path_factory.mktemp("no waiting") / "images")
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.putalpha(128)  # for --alpha_mask
            image.save(path)
    return folder


def model_on_meta() -> Model:
    """With a U-Net of one level: on this device each operation is Python code, so that a larger one takes seconds a step."""
    from diffusers import UNet2DConditionModel

    model = copy_of_two_blocks()
    model.parts["unet"] = UNet2DConditionModel(
        block_out_channels=(32,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
    ).requires_grad_(False).eval()  # fmt: skip
    for part in model.parts.values():
        part.to(META)
    return model


def svd_of_zeros(matrix: torch.Tensor, rank: int, niter: int) -> tuple[torch.Tensor, ...]:
    return torch.zeros(len(matrix), rank), torch.zeros(rank), torch.zeros(matrix.shape[1], rank)


@pytest.fixture
def steps_on_meta(images, tmp_path, monkeypatch):
    """`steps_on_meta(words...)` sets up a run on the meta device and takes two steps."""
    use_two_blocks(monkeypatch.setattr)
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects on a GPU; so they do here
    is_autocast_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and is_autocast_enabled(kind))
    monkeypatch.setattr(Machine, "device", META)
    monkeypatch.setattr(setup, "load_stable_diffusion", lambda *args, **kwargs: model_on_meta())
    monkeypatch.setattr(setup, "network_summary", lambda *args: "")  # numbers of the network, before the first step
    monkeypatch.setattr(setup, "model_digest", lambda model: "")  # likewise of the model
    monkeypatch.setattr(torch, "svd_lowrank", svd_of_zeros)  # likewise of a layer, for init=pissa
    monkeypatch.setattr(LossRecord, "flush", lambda self: None)  # reads the loss of the batch before, which has arrived by then

    def start(*words: str) -> Run:
        AcceleratorState._reset_state(reset_partial_state=True)
        options = parse_options(words_of_a_run(images, tmp_path / "out", "--max_train_steps=2", *words))
        machine = Machine.of(options.training)
        run = setup.prepare(preflight(options, torch.device("cpu"), 1), machine)
        progress = run.loop.progress
        run.step.start_epoch(1)
        batches = run.loop.loader.steps(1, 0, run.plan.accumulation)
        for _ in range(2):
            run.step(progress, next(batches))
            progress = progress.after_step(run.plan)
        return run

    yield start
    torch.__future__.set_swap_module_params_on_conversion(swap)


LYCORIS = ["--network_module=lycoris.kohya", "--network_args"]
NETWORKS = {
    "lora": [],
    "convolutions": ["--network_args", "conv_dim=2"],
    "dropout": ["--network_dropout=0.1", "--network_args", "rank_dropout=0.2", "module_dropout=0.2"],
    "DoRA": ["--network_args", "dora=true"],
    "DyLoRA": ["--network_module=networks.dylora", "--network_args", "unit=1"],
    "PiSSA": ["--network_args", "init=pissa"],
    "orthogonal": ["--network_args", "init=orthogonal"],
    "rsLoRA": ["--network_args", "rs_lora=true"],
    # Not algo=full: it copies the numbers of its layers while it is made.
    **{algo: [*LYCORIS, f"algo={algo}"] for algo in ("locon", "loha", "lokr", "ia3", "glora", "diag-oft", "boft")},
    "LyCORIS' DyLoRA": [*LYCORIS, "algo=dylora", "block_size=1"],
    "U-Net only": ["--network_train_unet_only", "--shuffle_caption", "--caption_dropout_rate=0.5"],  # no text cache
}
LOSSES = {
    "noise offset": ["--noise_offset=0.1", "--noise_offset_random_strength", "--adaptive_noise_scale=0.1"],
    "input perturbation": ["--ip_noise_gamma=0.1", "--ip_noise_gamma_random_strength"],
    "huber": ["--loss_type=huber", "--min_timestep=100", "--max_timestep=900"],
    "min-SNR": ["--min_snr_gamma=5", "--multires_noise_iterations=3"],
    "smooth L1": ["--loss_type=smooth_l1", "--huber_schedule=snr", "--debiased_estimation_loss", "--v_pred_like_loss=0.1"],
    "masks": ["--masked_loss", "--alpha_mask"],
    "zero terminal SNR": ["--zero_terminal_snr", "--v_parameterization", "--scale_v_pred_loss_like_noise_pred"],
    "weighted captions": ["--weighted_captions"],
}
STEPS = {
    "accumulation": ["--gradient_accumulation_steps=2"],
    "norms": ["--scale_weight_norms=1"],
    "average": ["--ema_decay=0.9"],
    "checkpointing": ["--gradient_checkpointing"],
    "fused backward": ["--fused_backward_pass"],
    "SGD": ["--optimizer_type=SGDNesterov"],
    # With relative_step AdaFactor itself compares numbers of tensors.
    "AdaFactor": ["--optimizer_type=AdaFactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"],
}
VARIANTS = {**NETWORKS, **LOSSES, **STEPS}


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_two_steps_ask_for_nothing(steps_on_meta, words):
    run = steps_on_meta(*words)
    assert {parameter.device for parameter in run.network.parameters} == {META}
    assert run.losses._pending is not None  # a loss was made


def test_it_would_be_seen(steps_on_meta, monkeypatch):
    """Such as the check of --on_nonfinite_loss=skip, which waits for each loss, as its help says; and a tensor of the CPU."""
    with pytest.raises(RuntimeError, match="meta"):
        steps_on_meta("--on_nonfinite_loss=skip")
    real = BatchLoss.latents
    monkeypatch.setattr(BatchLoss, "latents", lambda self, batch: real(self, batch).to("cpu"))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        steps_on_meta()
    monkeypatch.setattr(BatchLoss, "latents", lambda self, batch: real(self, batch) + torch.ones(1, 4, 8, 8))
    with pytest.raises(RuntimeError, match="device"):
        steps_on_meta()
