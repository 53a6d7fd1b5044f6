"""Modules of others through the same contract: LyCORIS (an extra) trains, saves, and its file loads back."""

from __future__ import annotations

import json
import zipfile
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.formats.lora_file import read_lora
from library.generation.extras.networks import Networks
from library.generation.options import NetworkOptions
from library.models.loading import load_stable_diffusion
from library.models.saving import save_stable_diffusion
from library.network_modules import import_network_module
from library.testing import small_sdxl
from library.training.network import merge_base_weights
from library.training.options import NetworkOptions as TrainedNetworkOptions
from networks.lora import find_layers

pytest.importorskip("lycoris.kohya", reason="an extra: pip install lycoris-lora")

UNET_ONLY = "--network_train_unet_only"


@pytest.mark.parametrize("algo", ["loha", "lokr", "locon", "ia3", "full", "glora", "diag-oft"])  # full takes the layers' weights
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

    file = f"--network_weights={done.folder / 'mine.safetensors'}"
    again = run(words[0], "--max_train_steps=1", UNET_ONLY, "--dim_from_weights", file)
    assert {key: t.shape for key, t in again.tensors().items()} == {key: t.shape for key, t in trained.items()}


@pytest.mark.parametrize("algo", ["loha", "lokr", "locon", "ia3"])
def test_files_of_lycoris_do_in_images_what_they_did_in_training(base_model, tmp_path, algo):
    """LyCORIS 4.1.3 itself makes nothing of ia3 files and of lokr's small ones; then the file's metadata says how."""
    if algo == "ia3" and version("lycoris-lora").startswith("3."):
        pytest.skip("LyCORIS 3 has no ia3 for this interface")
    model, again = (load_stable_diffusion(str(base_model)) for _ in range(2))
    module, file = import_network_module("lycoris.kohya"), tmp_path / "mine.safetensors"
    text_encoder, _ = model.for_networks()
    network = module.create_network(1.0, 2, 1.0, model.vae, text_encoder, model.denoiser, algo=algo)
    network.apply_to(text_encoder, model.denoiser, True, True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    words = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_network_alpha": "1.0"}
    network.save_weights(str(file), None, {**words, "ss_network_args": json.dumps({"algo": algo})})

    tokens, noisy = torch.arange(77)[None], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def predicted(of):
        return of.denoiser(noisy, torch.tensor([500]), encoder_hidden_states=of.text_encoders[0](tokens).last_hidden_state).sample

    base = predicted(again)
    networks = Networks.load(again, NetworkOptions(network_module=["lycoris.kohya"], network_weights=[str(file)]))
    torch.testing.assert_close(predicted(again), predicted(model), atol=1e-5, rtol=1e-4)
    networks.set([0.0])
    torch.testing.assert_close(predicted(again), base, atol=1e-5, rtol=1e-4)
    assert (predicted(model) - base).abs().max() > 1e-3


@pytest.mark.parametrize("algo", ["loha", "lokr", "locon", "ia3"])
@pytest.mark.parametrize("way", ["network_merge", "network_pre_calc", "base_weights"])
def test_files_of_lycoris_are_merged_as_its_forward_pass_says_at_any_strength(base_model, tmp_path, algo, way):
    """LyCORIS itself merges at strength 1, and LoHa and LoKr with alpha / rank twice: see test_adapters_lycoris.py."""
    if algo == "ia3" and version("lycoris-lora").startswith("3."):
        pytest.skip("LyCORIS 3 has no ia3 for this interface")
    module, file = import_network_module("lycoris.kohya"), str(tmp_path / "mine.safetensors")
    model = load_stable_diffusion(str(base_model))
    network = module.create_network(1.0, 2, 1.0, model.vae, *model.for_networks(), algo=algo)
    network.apply_to(*model.for_networks(), False, True)
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network.save_weights(file, None, {})
    network.restore()
    layer = model.denoiser.mid_block.attentions[0].proj_in
    before = layer.weight.detach().clone()
    change = read_lora(file).modules["lora_unet_mid_block_attentions_0_proj_in"].weight_change(before.double())
    if way == "base_weights":
        options = TrainedNetworkOptions(network_module="lycoris.kohya", base_weights=[file], base_weights_multiplier=[0.5])
        merge_base_weights(options, module, model)
    else:
        chosen = NetworkOptions(network_module=["lycoris.kohya"], network_weights=[file], network_mul=[0.5], **{way: True})
        Networks.load(model, chosen)
    torch.testing.assert_close(layer.weight.double(), before + 0.5 * change, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_files_of_lycoris_as_ckpt_are_read_by_the_suite_and_by_lycoris(run, base_model, algo):
    words = ["--network_module=lycoris.kohya", "--network_dim=2", "--network_args", f"algo={algo}", UNET_ONLY]
    done = run(*words, "--max_train_steps=2", "--save_model_as=ckpt", "--learning_rate=0.05")
    file = str(done.folder / "mine.ckpt")
    with zipfile.ZipFile(file) as archive:
        assert {name.split("/")[1] for name in archive.namelist()} <= {"data.pkl", "data", "version"}
    content = torch.load(file, weights_only=True)
    plain = str(done.folder / "plain.safetensors")
    save_file(content, plain)
    changes = []
    for path in (file, plain):
        model = load_stable_diffusion(str(base_model))
        before = model.denoiser.mid_block.attentions[0].proj_in.weight.clone()
        Networks.load(model, NetworkOptions(network_module=["networks.lora"], network_weights=[path], network_merge=True))
        changes.append(model.denoiser.mid_block.attentions[0].proj_in.weight - before)
    assert changes[0].abs().max() > 1e-5 and torch.equal(*changes)
    again = run(*words, "--max_train_steps=1", f"--network_weights={file}", "--learning_rate=1e-12")
    for key, tensor in again.tensors().items():
        torch.testing.assert_close(tensor, content[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("algo", ["loha", "locon"])
def test_trap_44_lycoris_trains_both_text_encoders_and_the_u_net_of_sdxl(run, tmp_path, algo):
    base = tmp_path / "sdxl.safetensors"
    save_stable_diffusion(small_sdxl(unet_channels=(32, 32, 32), depths=(1, 1, 1), vae_channels=(32, 32, 32, 32)), base)
    words = ["--network_module=lycoris.kohya", "--network_dim=2", "--network_args", f"algo={algo}", "--learning_rate=0.01"]
    done = run(f"--pretrained_model_name_or_path={base}", *words, "--max_train_steps=2")
    tensors = done.tensors()
    model = load_stable_diffusion(str(base))
    layers = find_layers(*model.for_networks(), conv3x3=True)
    assert set(layers) <= {key.partition(".")[0] for key in tensors}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    file = str(done.folder / "mine.safetensors")
    Networks.load(model, NetworkOptions(network_module=["networks.lora"], network_weights=[file], network_merge=True))
    unchanged = {name for name, layer in layers.items() if torch.equal(layer.weight, before[name])}
    assert unchanged == {name for name in layers if name.startswith("lora_te1_text_model_encoder_layers_2_")}  # no gradient


def test_text_encoder_names_are_the_ecosystems(run):
    """LyCORIS makes names by walking the modules, of which today's transformers has one level less."""
    done = run("--network_module=lycoris.kohya", "--network_dim=2", "--network_args", "algo=loha", "--max_train_steps=1")
    text = [key for key in done.tensors() if key.startswith("lora_te")]
    assert text and all(key.startswith("lora_te_text_model_encoder_layers_") for key in text)


def test_a_file_that_lycoris_cannot_open_is_one_line(run, tmp_path, not_utf8):
    save_file({"lora_unet_x.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(not_utf8 / "a.safetensors")
    words = ["--network_module=lycoris.kohya", "--network_dim=2", UNET_ONLY, f"--network_weights={not_utf8 / 'a.safetensors'}"]
    with pytest.raises(UserError, match=r"--network_weights .*a\.safetensors: SafetensorError: .* is not valid UTF-8"):
        run(*words, "--max_train_steps=1")
