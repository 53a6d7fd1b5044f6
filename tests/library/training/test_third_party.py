"""Modules of others through the same contract: LyCORIS (an extra) trains, saves, and its file loads back."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from library.network_modules import import_network_module

pytest.importorskip("lycoris.kohya", reason="an extra: pip install lycoris-lora")

UNET_ONLY = "--network_train_unet_only"


@pytest.mark.parametrize("algo", ["loha", "lokr", "locon", "ia3"])
def test_lycoris_trains_saves_and_loads_back(run, base_model, algo):
    if algo == "ia3" and version("lycoris-lora").startswith("3."):
        pytest.skip("LyCORIS 3 has no ia3 for this interface")
    words = ["--network_module=lycoris.kohya", "--network_dim=2", "--network_args", f"algo={algo}"]
    done = run(*words, "--max_train_steps=1", UNET_ONLY)
    trained = done.tensors()
    assert trained and all(torch.isfinite(t).all() for t in trained.values())
    assert all(key.startswith("lora_unet_") for key in trained)
    assert done.metadata()["ss_network_module"] == "lycoris.kohya"

    going_on = run(
        *words, "--max_train_steps=1", UNET_ONLY, f"--network_weights={done.folder / 'mine.safetensors'}", "--learning_rate=1e-12"
    )
    for key, tensor in going_on.tensors().items():
        torch.testing.assert_close(tensor, trained[key], atol=1e-5, rtol=1e-4)

    if algo in ("ia3", "lokr"):
        return  # LyCORIS 4.1.3 itself cannot make these from weights: other arguments (ia3), and its shapes for conv_in (lokr)
    from library.sd.model import load_stable_diffusion

    model = load_stable_diffusion(str(base_model))
    module = import_network_module("lycoris.kohya")
    network, _ = module.create_network_from_weights(
        1.0, str(done.folder / "mine.safetensors"), model.vae, model.text_encoder, model.unet
    )
    names = {key.split(".")[0] for key in trained}
    assert {lora.lora_name for lora in network.unet_loras + network.text_encoder_loras} == names


def test_text_encoder_names_are_the_ecosystems(run):
    """LyCORIS makes names by walking the modules, of which today's transformers has one level less."""
    done = run("--network_module=lycoris.kohya", "--network_dim=2", "--network_args", "algo=loha", "--max_train_steps=1")
    text = [key for key in done.tensors() if key.startswith("lora_te")]
    assert text and all(key.startswith("lora_te_text_model_encoder_layers_") for key in text)
