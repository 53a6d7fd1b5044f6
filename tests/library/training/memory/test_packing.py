"""--base_dtype: what is kept in few bits is nearly what it was, learns as before, and needs no memory in the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.testing import full_size_header
from library.training.checks.contradictions import contradictions
from library.training.checks.estimates import fixed_bytes, frozen_bytes
from library.training.memory import packing
from library.training.memory.frozen import freeze_layers
from library.training.memory.packing import FORMATS, NF4, PackedConv2d, PackedLinear, pack_layer, pack_weights
from library.training.memory.precision import NumberFormats
from library.training.options import parse_options
from networks.lora import LoRAModule, create_network
from tests.library.training.small_runs import image_folder, tensors_of, train, two_blocks, use_two_blocks, words_of_a_run

NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]
# format -> largest share by which a weight of normal numbers may be off
ERRORS = {"int8": 0.012, "fp8": 0.03, "nf4": 0.1}


def options(*words: str):
    return parse_options([*NEEDED, *words])


def formats(*words: str) -> NumberFormats:
    chosen = options(*words)
    return NumberFormats.of(chosen.training, chosen.precision)


@pytest.fixture
def unet():
    return copy.deepcopy(two_blocks().denoiser)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32)


def unpacked(name: str, packed: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    weight = torch.empty(shape)
    FORMATS[name].unpack(packed, scale.float(), weight)
    return weight


def weight_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(48, 64), (7, 3, 3, 3), (16, 24, 1, 1)])
def test_weights_are_nearly_what_they_were_in_their_bits(name, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.02
    packed, scale = FORMATS[name].pack(weight)
    back = unpacked(name, packed, scale, weight.shape)
    assert back.shape == weight.shape and 0 < (back - weight).norm() / weight.norm() < ERRORS[name]
    if weight.numel() % 64 == 0 and name == "nf4":
        assert (packed.nbytes + scale.nbytes) * 8 / weight.numel() == FORMATS[name].bits
    assert packed.nbytes <= (weight.numel() + 63) * FORMATS[name].bits / 8


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros_and_the_largest_stays(name):
    weight = torch.zeros(2, 64)
    weight[1, 3] = -5.0
    packed, scale = FORMATS[name].pack(weight)
    torch.testing.assert_close(unpacked(name, packed, scale, weight.shape), weight, rtol=1e-2, atol=0)


def test_nf4_takes_the_nearest_of_its_numbers():
    weight = torch.tensor(NF4).repeat(4).view(1, 64) * 3
    packed, scale = FORMATS["nf4"].pack(weight)
    assert packed.numel() == 32 and torch.equal(unpacked("nf4", packed, scale, weight.shape), weight)
    other = weight + torch.tensor([0.1, -0.1]).repeat(32)  # less than half of the least distance, 0.08 x 3
    assert torch.equal(FORMATS["nf4"].pack(other.clamp(-3, 3))[0], packed)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_rows_of_small_weights_keep_their_digits(name):
    torch.manual_seed(0)
    weight = torch.randn(4, 64) * torch.tensor([1e-4, 1e-2, 1.0, 1e3]).view(-1, 1)
    packed, scale = FORMATS[name].pack(weight)
    errors = (unpacked(name, packed, scale, weight.shape) - weight).norm(dim=1) / weight.norm(dim=1)
    assert (errors < 0.04).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(48, 64), (7, 3, 3, 3), (5, 1000)])
def test_weights_unpacked_in_pieces_are_those_unpacked_at_once(name, shape, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed, scale = FORMATS[name].pack(weight)
    at_once = unpacked(name, packed, scale, weight.shape)
    monkeypatch.setattr(packing, "PIECE", 128)
    assert torch.equal(unpacked(name, packed, scale, weight.shape), at_once)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("name", FORMATS)
def test_layers_share_the_memory_of_one_weight_and_each_reads_its_own(unet, name):
    x, t, context = inputs()
    pack_weights(unet, name)
    layers = [layer for layer in unet.modules() if isinstance(layer, PackedLinear | PackedConv2d)]
    first = layers[0].borrowed_weight()
    assert {layer.borrowed_weight().data_ptr() for layer in layers} == {first.data_ptr()}
    assert first.untyped_storage().nbytes() == max(layer.weight.nbytes for layer in layers)
    assert all(torch.equal(layer.borrowed_weight(), layer.weight) for layer in layers)
    kept, other = layers[0].weight, layers[1].borrowed_weight()
    assert kept.data_ptr() != other.data_ptr() and torch.equal(kept, layers[0].weight), "`weight` is the reader's own"
    with torch.inference_mode():
        drawn = unet(x, t, context).sample
    assert torch.equal(drawn, unet(x, t, context).sample.detach())


@pytest.mark.parametrize("name, share, error", [("int8", 0.33, 0.05), ("fp8", 0.33, 0.2), ("nf4", 0.22, 0.6)])
def test_a_packed_model_is_smaller_and_says_nearly_the_same(unet, name, share, error):
    x, t, context = inputs()
    before, dtype = weight_bytes(unet), unet.dtype
    with torch.no_grad():
        plain = unet(x, t, context).sample
        saved = pack_weights(unet, name)
        packed = unet(x, t, context).sample
    assert weight_bytes(unet) == before - saved < share * before and unet.dtype == dtype
    assert 0 < (packed - plain).norm() / plain.norm() < error  # of random weights; those of a trained model do better
    assert pack_weights(unet, name) == 0, "once is enough"


@pytest.mark.parametrize("layer, shape, kind", [
    (nn.Linear(16, 24), (2, 5, 16), PackedLinear),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 16, 16), PackedConv2d),
    (nn.Conv2d(4, 6, 1, bias=False), (1, 4, 9, 9), PackedConv2d),
])  # fmt: skip
def test_trap_58_gradients_to_the_input_are_those_of_the_unpacked_weight_and_nothing_is_kept_for_them(
    layer, shape, kind, by_onednn
):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).requires_grad_(False)
    pack_layer(layer, "int8")
    assert isinstance(layer, kind) and not any(p.requires_grad for p in layer.parameters())
    twin = nn.Linear(16, 24) if kind is PackedLinear else nn.Conv2d(4, 6, layer.kernel_size, layer.stride, layer.padding)
    twin.weight, twin.bias = nn.Parameter(layer.weight), layer.bias
    x = torch.randn(shape, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    twin.weight.requires_grad_(False)
    if by_onednn:
        freeze_layers(twin.requires_grad_(False))  # for the same products
    assert not kept and torch.equal(y, twin(x))
    direction = torch.randn_like(y)
    ours, plain = (torch.autograd.grad(module(x), x, direction)[0] for module in (layer, twin))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(16, 24), (2, 5, 16)), (nn.Conv2d(4, 6, 1), (2, 4, 5, 5)), (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 6, 5)),
])  # fmt: skip
@pytest.mark.parametrize("name", FORMATS)
def test_a_lora_on_a_packed_layer_has_the_gradients_of_the_unpacked_weight(layer, shape, name):
    torch.manual_seed(0)
    layer, twin = copy.deepcopy(layer).requires_grad_(False), copy.deepcopy(layer)
    pack_layer(layer, name)
    twin.weight, twin.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
    lora = LoRAModule("lora", twin, 4, 4)
    nn.init.normal_(lora.lora_up.weight)
    lora.attach(layer)
    results = []
    for formula in (layer, lambda x: twin(x) + lora(x)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = formula(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *lora.parameters()])))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_what_is_attached_stays_and_what_learns_is_left_alone():
    torch.manual_seed(0)
    frozen, learns = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)
    frozen.register_forward_hook(lambda layer, given, output: output + 1)
    x = torch.randn(3, 8)
    plain = frozen(x)
    pack_weights(nn.ModuleList([frozen, learns]), "int8")
    torch.testing.assert_close(frozen(x), plain, rtol=0.1, atol=0.1)
    assert type(learns) is nn.Linear


@pytest.mark.parametrize("name", FORMATS)
def test_a_lora_learns_on_it_with_checkpointing_as_without(unet, name):
    torch.manual_seed(0)
    network = create_network(1.0, 2, 2, None, None, unet)
    network.apply_to(None, unet, False, True)
    for lora in network.loras:
        nn.init.normal_(lora.lora_up.weight, std=0.1)
    pack_weights(unet, name)
    base = {key: value.clone() for key, value in unet.state_dict().items()}
    found = []
    for checkpointing in (False, True):
        (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
        network.zero_grad()
        unet.train()(*inputs()).sample.square().mean().backward()
        found.append([p.grad.clone() for p in network.parameters()])
    assert all(gradient.any() for gradient in found[0])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(value, base[key]) for key, value in unet.state_dict().items()), "the base stays"


def test_half_precision_and_autocast():
    torch.manual_seed(0)
    layer = nn.Linear(64, 8).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 64, requires_grad=True)
    pack_layer(layer, "nf4")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert layer.weight.dtype == y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32 and x.grad.any()


# ---------------------------------------------------------------- options


@pytest.mark.option("base_dtype")
def test_formats_by_option():
    def packed(*words: str) -> tuple[str | None, str | None]:
        return formats(*words).unet, formats(*words).text_encoder

    assert packed() == (None, None) and packed("--base_dtype=nf4") == ("nf4", "nf4")
    assert packed("--fp8_base") == packed("--base_dtype=fp8") == ("fp8", "fp8")
    assert packed("--fp8_base_unet") == ("fp8", None)


@pytest.mark.parametrize("flag", ["fp8_base", "fp8_base_unet"])
def test_two_formats_contradict_each_other(flag):
    (problem,) = contradictions(options("--base_dtype=int8", f"--{flag}"))
    assert problem.startswith(f"--{flag} and --base_dtype int8 name two formats") and "leave out" in problem
    assert not contradictions(options("--base_dtype=fp8", f"--{flag}"))


@pytest.mark.parametrize("word, part", [
    ("--base_dtype=int4", "--base_dtype: expected 'int8', 'fp8' or 'nf4', got 'int4'"),
    ("--base_dtyp=int8", "did you mean '--base_dtype'"),
])  # fmt: skip
def test_wrong_formats_and_names(word, part):
    with pytest.raises(UserError, match=part):
        options(word)


def test_estimates_know_the_formats():
    half = ["--mixed_precision=fp16"]
    cases = ([], ["--base_dtype=int8"], ["--base_dtype=nf4"], ["--fp8_base_unet"])
    sizes = [frozen_bytes(formats(*half, *more), full_size_header()) / 1e9 for more in cases]
    assert sizes == pytest.approx([2.132, 1.188, 0.746, 1.273], abs=0.001)
    plain, packed = (fixed_bytes(formats(*half, *more), options().network, full_size_header()) for more in ([], ["--fp8_base"]))
    assert plain - packed == pytest.approx(0.944e9, rel=1e-3)
    assert frozen_bytes(formats(), full_size_header()) / 1e9 == pytest.approx(4.264, abs=0.001)


# ---------------------------------------------------------------- runs


@pytest.fixture
def words(tmp_path, monkeypatch):
    use_two_blocks(monkeypatch.setattr)
    images = image_folder(tmp_path / "images", 2)
    return lambda name, *more: words_of_a_run(images, tmp_path / name, "--base_dtype=nf4", *more)


def test_a_run_on_a_packed_model_learns_draws_and_goes_on_exactly(words, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a square --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    drawing = [f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=2"]
    whole = train(words("whole", "--max_train_steps=4", *drawing))
    assert "frozen weights in nf4" in capsys.readouterr().out
    assert isinstance(whole.model.denoiser.conv_in, PackedConv2d) and isinstance(whole.model.vae.decoder.conv_in, nn.Conv2d)
    assert not isinstance(whole.model.vae.decoder.conv_in, PackedConv2d)
    assert len(list((tmp_path / "whole" / "sample").glob("*.png"))) == 2
    train(words("half", "--max_train_steps=4", "--save_every_n_steps=2", "--save_state"))
    state = next((tmp_path / "half").glob("*000002-state"))
    train(words("half2", "--max_train_steps=4", f"--resume={state}"))
    ends = [tensors_of(tmp_path / name / "mine.safetensors") for name in ("whole", "half2")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert any(tensor.any() for key, tensor in ends[0].items() if "lora_up" in key)
