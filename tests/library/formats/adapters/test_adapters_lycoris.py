"""Every kind of adapter against LyCORIS: modules built there, saved to a file, and read here.

What a file means is what its trainer computed with it, so the reference is the forward pass of LyCORIS' module. Its merging is a
second one, where it agrees with its own forward pass: for LoHa and LoKr it multiplies by alpha / rank twice (lycoris-lora 3.4.0
and 4.1.3), the papers and its forward pass once.
"""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from lycoris.modules import (
    ButterflyOFTModule,
    DiagOFTModule,
    FullModule,
    GLoRAModule,
    IA3Module,
    LoConModule,
    LohaModule,
    LokrModule,
    NormModule,
    get_module,
)
from torch import Tensor, nn

from library.formats.adapters.registry import Adapter, find_adapter
from library.formats.lora_file import read_lora
from networks.lora import create_network_from_weights
from tests.tool_files import small_model

RANK = 4
LAYERS = {
    "linear": lambda: nn.Linear(24, 16),
    "conv 1x1": lambda: nn.Conv2d(24, 16, 1),
    "conv 3x3": lambda: nn.Conv2d(24, 16, 3, padding=1),
}
# Class and options; the kind it is here.
KINDS = {
    "lora": (LoConModule, {}, "LoRA"),
    "loha": (LohaModule, {}, "LoHa"),
    "lokr": (LokrModule, {}, "LoKr"),
    "lokr of four factors": (LokrModule, {"decompose_both": True, "lora_dim": 1, "factor": 4}, "LoKr"),
    "lokr low rank": (LokrModule, {"lora_dim": 2, "factor": 2}, "LoKr"),
    "lokr full": (LokrModule, {"full_matrix": True}, "LoKr"),
    "lokr unbalanced": (LokrModule, {"unbalanced_factorization": True, "lora_dim": 1, "factor": 2}, "LoKr"),
    "glora": (GLoRAModule, {}, "GLoRA"),
    "ia3 on output": (IA3Module, {}, "IA3"),
    "ia3 on input": (IA3Module, {"train_on_input": True}, "IA3"),
    "full": (FullModule, {}, "full difference"),
    "oft": (DiagOFTModule, {"alpha": 0}, "OFT"),
    "oft with bound and rescale": (DiagOFTModule, {"alpha": 0, "constraint": 1 / 64, "rescaled": True}, "OFT"),
    "boft": (ButterflyOFTModule, {"alpha": 0}, "BOFT"),
    "boft with bound and rescale": (ButterflyOFTModule, {"alpha": 0, "constraint": 1 / 64, "rescaled": True}, "BOFT"),
}
DORA = {
    f"{name}, DoRA by {axis}": (KINDS[name], axis == "rows") for name in ("lora", "loha", "lokr") for axis in ("rows", "columns")
}
SCALED = ("lora", "loha", "lokr low rank", "glora")  # those whose alpha is a strength


def trained(cls: type, layer: nn.Module, seed: int = 0, **options) -> nn.Module:
    """A module of LyCORIS on the layer, as if it had been trained."""
    torch.manual_seed(seed)
    options = {"multiplier": 1.0, "lora_dim": RANK, "alpha": 2.0} | options
    module = cls("layer", copy.deepcopy(layer), **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if cls is FullModule:
            module.apply_to()  # it saves differences from the layer's weight only after it has taken it over
    return module.requires_grad_(False)


def saved(module: nn.Module, folder) -> dict[str, Tensor]:
    """The module's tensors, from a file."""
    file = folder / "module.safetensors"
    safetensors.torch.save_file({name: value.contiguous() for name, value in module.state_dict().items()}, file)
    return safetensors.torch.load_file(file)


def found(tensors: dict[str, Tensor]) -> Adapter:
    adapter = find_adapter("layer", tensors)
    assert adapter is not None and not adapter.unknown
    return adapter


def inputs(layer: nn.Module) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(5, 24) if isinstance(layer, nn.Linear) else torch.randn(2, 24, 5, 5)


def changed_output(adapter: Adapter, layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output, in float64, with the change that we compute."""
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    bias_change = adapter.bias_change(bias)
    weight = weight + adapter.weight_change(weight)
    bias = bias if bias_change is None else bias + bias_change
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x.double(), weight, bias)
    return nn.functional.conv2d(x.double(), weight, bias, padding=layer.padding)


def check_forward(adapter: Adapter, module: nn.Module, layer: nn.Module) -> None:
    x = inputs(layer)
    theirs, plain = module(x).detach().double(), layer(x).detach().double()
    assert (theirs - plain).norm() > 0.05 * plain.norm()  # else nothing is compared
    torch.testing.assert_close(changed_output(adapter, layer, x), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind, shape, tmp_path):
    cls, options, name = KINDS[kind]
    layer = LAYERS[shape]()
    module = trained(cls, layer, **options)
    adapter = found(saved(module, tmp_path))
    assert adapter.title == name
    check_forward(adapter, module, layer)


@pytest.mark.parametrize("cls", [LoConModule, LohaModule, LokrModule])
def test_tucker(cls, tmp_path):
    layer = LAYERS["conv 3x3"]()
    module = trained(cls, layer, lora_dim=2, alpha=1.0, use_tucker=True, factor=2)
    tensors = saved(module, tmp_path)
    assert {"lora_mid.weight", "hada_t1", "lokr_t2"} & set(tensors)
    check_forward(found(tensors), module, layer)


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("kind", DORA)
def test_dora(kind, shape, tmp_path):
    (cls, options, name), rows = DORA[kind]
    layer = LAYERS[shape]()
    module = trained(cls, layer, weight_decompose=True, wd_on_out=rows, **options)
    adapter = found(saved(module, tmp_path))
    assert adapter.title == f"{name} with DoRA" and adapter.needs_weight
    check_forward(adapter, module, layer)


@pytest.mark.parametrize("layer", [nn.LayerNorm(24), nn.GroupNorm(4, 24)], ids=["LayerNorm", "GroupNorm"])
def test_norm_layers(layer, tmp_path):
    module = trained(NormModule, layer)
    adapter = found(saved(module, tmp_path))
    merged = module.get_merged_weight(1.0, layer.weight.shape, "cpu")
    assert adapter.title == "norm difference"
    torch.testing.assert_close(layer.weight + adapter.weight_change(layer.weight), merged[0])
    torch.testing.assert_close(layer.bias + adapter.bias_change(layer.bias), merged[1])


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_merge(kind, shape, tmp_path):
    cls, options, _ = KINDS[kind]
    layer = LAYERS[shape]()
    rank = options.get("lora_dim", RANK)
    module = trained(cls, layer, **{"alpha": float(rank)} | options)
    adapter = found(saved(module, tmp_path))
    theirs, bias = module.get_merged_weight(1.0, layer.weight.shape, "cpu")
    ours = layer.weight.detach() + adapter.weight_change(layer.weight.detach())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if bias is not None:
        torch.testing.assert_close(layer.bias + adapter.bias_change(layer.bias), bias)


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("kind", ["loha", "lokr low rank"])
def test_lycoris_merges_loha_and_lokr_with_alpha_by_rank_once_more(kind, shape, tmp_path):
    """The one difference from ours: at any other alpha than the rank its merged layer is not what it trained."""
    cls, options, _ = KINDS[kind]
    layer = LAYERS[shape]()
    rank = options.get("lora_dim", RANK)
    module = trained(cls, layer, **options | {"alpha": rank / 4})
    change = found(saved(module, tmp_path)).weight_change(layer.weight.detach().double())
    theirs, _ = module.get_merged_weight(1.0, layer.weight.shape, "cpu")
    torch.testing.assert_close(theirs - layer.weight, (change / 4).float(), rtol=1e-4, atol=1e-5)
    check_forward(found(saved(module, tmp_path)), module, layer)


@pytest.mark.parametrize("alpha", ["missing", "0", "shape [1]", "integer", "negative"])
@pytest.mark.parametrize("kind", SCALED)
def test_alpha(kind, alpha, tmp_path):
    cls, options, _ = KINDS[kind]
    layer = LAYERS["linear"]()
    rank = options.get("lora_dim", RANK)
    value = {"missing": rank, "0": rank, "shape [1]": 1.5, "integer": 3, "negative": -2.0}[alpha]
    module = trained(cls, layer, **options | {"alpha": float(value)})
    tensors = saved(module, tmp_path)
    assert float(tensors.pop("alpha")) == value
    stored = {
        "0": torch.tensor(0.0),
        "shape [1]": torch.tensor([1.5]),
        "integer": torch.tensor(3),
        "negative": torch.tensor(-2.0),
    }
    check_forward(found(tensors if alpha == "missing" else tensors | {"alpha": stored[alpha]}), module, layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "full"])  # it loads onto a layer not yet changed
def test_half_precision_files(kind, dtype, tmp_path):
    cls, options, _ = KINDS[kind]
    layer = LAYERS["linear"]()
    module = trained(cls, layer, **options)
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in saved(module, tmp_path).items()}
    module.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in half.items()})
    check_forward(found(half), module, layer)


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_finds_the_same_kind(kind, tmp_path):
    cls, options, _ = KINDS[kind]
    module = trained(cls, LAYERS["linear"](), **options)
    assert get_module({f"layer.{name}": value for name, value in saved(module, tmp_path).items()}, "layer")[0] is cls


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "pt"])
@pytest.mark.parametrize("algo", ["locon", "loha", "lokr", "ia3"])
def test_the_file_that_lycoris_itself_writes_acts_as_its_network_did(tmp_path, algo, suffix):
    """Made, applied and saved by its network for kohya's trainer; drawn and merged here by what is in the file."""
    from lycoris import kohya

    model = small_model()
    text_encoder, unet = model.for_networks()
    theirs = kohya.create_network(1.0, 2, 1.0, None, text_encoder, unet, algo=algo, preset="attn-mlp")
    theirs.apply_to(text_encoder, unet, False, True)
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    generator = torch.Generator().manual_seed(1)
    noisy, text = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 7, 64, generator=generator)

    @torch.no_grad()
    def answer() -> Tensor:
        return unet(noisy, torch.tensor([500]), text).sample

    expected, file = answer(), tmp_path / f"mine.{suffix}"
    theirs.save_weights(str(file), None, {})
    theirs.restore()
    plain = answer()
    ours, weights = create_network_from_weights(1.0, file, None, text_encoder, unet)
    ours.apply_to(text_encoder, unet)
    ours.load_state_dict(weights)
    found = answer()
    ours.unapply()
    assert (expected - plain).abs().max() > 2e-3 and torch.equal(answer(), plain)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)
    assert len(read_lora(file).modules) == len(ours.loras)
