"""Every kind of network through the trainer: it trains, its file loads, and what it is made of is printed."""

from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from library.key_values import read_pairs
from library.models.loading import load_stable_diffusion
from networks.lora import create_network_from_weights


@pytest.mark.parametrize(
    "words, rank",
    [
        (["init=pissa"], 4),
        (["init=orthogonal"], 2),
        (["dora=True", "conv_dim=2"], 2),
        (["rs_lora=True", "loraplus_lr_ratio=4"], 2),
    ],
)
def test_each_kind_trains_and_its_file_loads(run, base_model, capsys, words, rank):
    done = run("--network_module=networks.lora", "--network_dim=2", "--max_train_steps=2", "--network_args", *words)
    assert "LoRA modules" in capsys.readouterr().out
    assert done.metadata()["ss_network_dim"] == str(rank)
    model = load_stable_diffusion(str(base_model))
    network, weights = create_network_from_weights(
        1.0, done.folder / "mine.safetensors", None, model.text_encoders[0], model.denoiser
    )
    network.load_state_dict(weights)
    assert {module.rank for module in network.loras} == {rank}
    before = [p.clone() for p in model.denoiser.parameters()]
    network.merge_to(model.text_encoders[0], model.denoiser, weights)
    changed = sum(not torch.equal(a, b) for a, b in zip(before, model.denoiser.parameters(), strict=True))
    assert changed == len(network.parts["lora_unet"])


def test_going_on_from_pissa_and_its_limits(run):
    words = ["--network_module=networks.lora", "--network_dim=2", "--max_train_steps=1"]
    done = run(*words, "--network_args", "init=pissa")
    file = f"--network_weights={done.folder / 'mine.safetensors'}"
    again = run(*words, file, "--network_args", "init=pissa", "--learning_rate=1e-12")
    before = done.tensors()
    for key, tensor in again.tensors().items():
        torch.testing.assert_close(tensor, before[key], atol=1e-6, rtol=1e-4)
    plain = run(*words, file, "--dim_from_weights")
    assert plain.metadata()["ss_network_module"] == "networks.lora"
    with pytest.raises(UserError, match="--scale_weight_norms: it would shrink the model's own part"):
        run(*words, "--scale_weight_norms=1", "--network_args", "init=pissa")


def test_the_chart_of_blocks_is_printed(run, capsys):
    run("--network_module=networks.lora", "--max_train_steps=1", "--network_args", "down_lr_weight=sine+.5")
    assert "rate x 0.642 ======" in capsys.readouterr().out


def test_trap_2_5_words_are_split_at_the_first_sign():
    assert read_pairs(["preset=a=b", " conv_dim = 4 "], "--network_args") == {"preset": "a=b", "conv_dim": "4"}
    with pytest.raises(UserError, match="expected key=value, got 'conv_dim'"):
        read_pairs(["conv_dim"], "--network_args")
