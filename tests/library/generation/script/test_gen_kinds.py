"""Every kind of adapter through the command: what is drawn with `--network_weights` is what the merged model draws."""

from __future__ import annotations

import pytest
from kind_files import KINDS, file_of
from tool_files import save_lora

from networks import merge_lora


def differences(one: list[bytes], other: list[bytes]) -> int:
    """The largest difference of two images, in steps of 256."""
    return max(abs(a - b) for first, second in zip(one, other, strict=True) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_with_a_file_is_drawn_by_the_merged_model(draw, gen_files, tmp_path, kind):
    # In an image of 64 px the middle has one position, where to_q changes nothing. Products of four small factors are very small.
    scale = 4 if kind in ("LoHa", "LoKr") else 1
    tensors = {key.replace("attn1_to_q", "attn1_to_out_0"): value * scale for key, value in file_of(kind).items()}
    file, merged = save_lora(tmp_path / "kind.safetensors", tensors), tmp_path / "merged.safetensors"
    base = str(gen_files / "model.safetensors")
    merge_lora.main(["--sd_model", base, "--save_to", str(merged), "--models", file, "--ratios", "5"])
    network = ["--network_module=networks.lora", "--network_mul", "5"]
    words = ["--prompt=a cat", "--seed=1"]
    plain, applied, expected = (
        draw(*words, *more).pixels() for more in ([], [*network, "--network_weights", file], [f"--ckpt={merged}"])
    )
    assert differences(applied, plain) > 2
    assert differences(applied, expected) <= 2
