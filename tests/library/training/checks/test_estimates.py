"""The estimate of memory: what a U-Net keeps follows from the shapes of its weights, whatever family it is of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from library.models import sdxl
from library.models.loading import Header
from library.models.unet import empty_unet, unet_config
from library.testing import full_size_header, header_of, small_sdxl
from library.training.checks.estimates import estimated_bytes, kept_bytes
from library.training.memory.frozen import freeze_layers
from library.training.memory.gradient_checkpointing import count_kept
from library.training.options import parse_options
from networks.lora import create_network

NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]
XL = {"context_width": 2048, "heads": None, "linear_projection": True, "attention": (False, True, True), "vector_width": 2816}
SSD_1B = {
    "depths": {
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "middle": "UNetMidBlock2D",
}
KOALA_700M = {
    "depths": {"transformer_layers_per_block": [1, 2, 5], "reverse_transformer_layers_per_block": [5, 2, 1]},
    "middle": None,
    "layers": 1,
}


def relative(words: dict) -> Header:
    """The header of a distilled relative of SDXL at full size."""
    unet = empty_unet(unet_config((320, 640, 1280), **XL, **words))
    return Header(sdxl.FAMILY, {"unet": {name: tuple(value.shape) for name, value in unet.named_parameters()}})


@pytest.mark.parametrize(
    "header, plain, checkpointed",
    [
        (lambda: full_size_header("sd1"), 207_400, 33_600),
        (lambda: full_size_header("sd2"), 207_300, 33_600),
        (lambda: full_size_header("sdxl"), 396_500, 31_800),
        (lambda: relative(SSD_1B), 225_500, 25_100),
        (lambda: relative(KOALA_700M), 144_400, 15_800),
    ],
)
def test_kept_bytes_at_full_size_are_what_was_counted(header, plain, checkpointed):
    """The numbers are `count_kept` of U-Nets without content, with a LoRA of rank 16, bfloat16 by autocast on a CPU."""
    found = kept_bytes(header())
    assert found == pytest.approx((plain, checkpointed), rel=0.06)


def test_trap_57_61_the_small_sdxl_keeps_what_its_shapes_say_and_less_with_checkpointing():
    model = small_sdxl(unet_channels=(64, 128, 256), depths=(1, 1, 2), text_width=32)
    header = header_of(model)
    network = create_network(1.0, 2, 2, None, *model.for_networks())
    network.apply_to(*model.for_networks(), False, True)
    freeze_layers(model.denoiser)
    model.denoiser.enable_gradient_checkpointing()
    model.denoiser.train()
    table = SimpleNamespace(configs=[SimpleNamespace(batch_size=1)], buckets=[SimpleNamespace(dataset=0, size=(512, 512))])
    counted = count_kept(
        model, SimpleNamespace(module=network), SimpleNamespace(table=table), 77, lambda: torch.autocast("cpu", torch.bfloat16)
    )
    plain, checkpointed = (sum(kept) / 64**2 for kept in counted)
    assert kept_bytes(header) == pytest.approx((plain, checkpointed), rel=0.3)
    assert checkpointed < 0.3 * plain


def test_a_run_on_sdxl_at_1024_is_estimated_as_the_memory_tables_say():
    """Weights in 16 bits 6.46 GiB, activations 6.5 GiB without checkpointing and 0.7 with it, each with what is on top."""
    words = ["--mixed_precision=bf16", "--network_dim=16", "--network_train_unet_only"]
    plain, saving = (
        estimated_bytes(parse_options([*NEEDED, *words, *more]), full_size_header("sdxl"), 1, (1024, 1024)) / 2**30
        for more in ([], ["--gradient_checkpointing"])
    )
    assert 14 < plain < 17 and 7.5 < saving < 9
