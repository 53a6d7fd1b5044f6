"""rs_lora, PiSSA, the orthogonal start and DoRA: against peft's results for the same weights, and as files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import networks.lora
from networks.lora import create_network, create_network_from_weights
from networks.suite_module import SuiteModule
from networks.suite_network import SuiteNetwork
from networks.variants import VARIANTS, DoRAModule, OrthogonalModule, PissaModule, Variant, register

CONV = {"conv_dim": "4", "conv_alpha": "3"}
LAYERS = [
    (nn.Linear(12, 10), (2, 3, 12)),
    (nn.Conv2d(12, 10, 1), (2, 12, 4, 4)),
    (nn.Conv2d(12, 10, 3, padding=1), (2, 12, 5, 4)),
]
LAYERS.append((nn.Conv2d(12, 10, 3, stride=2, padding=1), (2, 12, 6, 6)))
IDS = ["linear", "1x1", "3x3", "3x3 stride 2"]


def outputs(model):
    with torch.no_grad():
        return torch.cat([part.flatten() for part in model.run()])


def make_network(model, trained=True, **network_args):
    torch.manual_seed(0)
    network = create_network(1.0, 4, 2.0, None, model.text_encoder, model.unet, **network_args).eval()
    if trained:
        for parameter in network.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1
    return network


def peft_layer(layer, rank, alpha, **config):
    """The layer wrapped by peft."""
    import peft

    model = nn.Sequential(copy.deepcopy(layer))
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], **config)).base_model.model[
        0
    ]


def set_peft(layer, up, down):
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down.clone(), up.clone()


def ours(kind, layer, rank, alpha):
    """A module of a copy of the layer, attached."""
    layer = copy.deepcopy(layer).requires_grad_(False)
    module = kind("lora", layer, rank, alpha)
    module.attach(layer)
    return layer, module


# ---------------------------------------------------------------- against peft


def test_rs_lora_is_pefts(model):
    torch.manual_seed(0)
    network = make_network(model, rs_lora="True", **CONV)
    for module in (network.parts["lora_unet"][0], network.parts["lora_te"][-1]):
        layer = nn.Linear(module.lora_down.weight[0].numel(), len(module.lora_up.weight))
        theirs = peft_layer(layer, 4, 2.0, use_rslora=True)
        set_peft(theirs, module.lora_up.weight.data.flatten(1), module.lora_down.weight.data.flatten(1))
        x = torch.randn(5, layer.in_features)
        delta = x @ (module.scale * module.lora_up.weight.flatten(1) @ module.lora_down.weight.flatten(1)).T
        torch.testing.assert_close(layer(x) + delta, theirs(x))
    # alpha / sqrt(rank), stored so that alpha / rank is that
    assert {round(m.alpha.item() / m.rank, 6) for m in network.loras} == {1.0, 1.5}


@pytest.mark.parametrize("layer, shape", LAYERS, ids=IDS)
def test_pissa_starts_as_the_layer_and_trains_as_pefts(layer, shape):
    torch.manual_seed(0)
    mine, module = ours(PissaModule, layer, 4, 2.0)
    x = torch.randn(shape)
    torch.testing.assert_close(mine(x), layer(x), atol=1e-6, rtol=1e-5)
    product = module.scale * module.lora_up.weight.flatten(1) @ module.lora_down.weight.flatten(1)
    u, s, vh = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
    torch.testing.assert_close(product, u[:, :4] * s[:4] @ vh[:4], atol=1e-4, rtol=1e-3)
    if isinstance(layer, nn.Linear):
        theirs = peft_layer(layer, 4, 2.0, init_lora_weights="pissa")
        up, down = (t["default"].weight for t in (theirs.lora_B, theirs.lora_A))
        torch.testing.assert_close(module.scale * up @ down, product, atol=1e-4, rtol=1e-3)
        module.lora_up.weight.data, module.lora_down.weight.data = up.data.clone(), down.data.clone()
        module.start_up.copy_(up.data), module.start_down.copy_(down.data)
        for y in (mine(x), theirs(x)):
            y.square().sum().backward()
        torch.testing.assert_close(module.lora_down.weight.grad, down.grad, atol=1e-3, rtol=1e-3)
        module.lora_up.weight.data += 0.1
        up.data += 0.1
        torch.testing.assert_close(mine(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_the_orthogonal_start_is_pefts():
    layer = nn.Linear(12, 10)
    torch.manual_seed(3)
    module = OrthogonalModule("lora", layer, 4, 2.0)
    torch.manual_seed(3)
    theirs = peft_layer(layer, 4, 2.0, init_lora_weights="orthogonal")
    # Both have drawn the numbers of an ordinary start before, which are as many.
    up, down = theirs.lora_B["default"].weight, theirs.lora_A["default"].weight
    assert (module.lora_up.weight @ module.lora_down.weight).abs().max() < 1e-6
    assert module.lora_up.weight.abs().max() > 0.01
    torch.manual_seed(4)
    q = torch.linalg.qr(torch.randn(4, 4))[0]
    expected = (torch.randn(12, 2) @ q[0::2]).T / 10, torch.randn(2, 10).T @ q[1::2] / 10
    torch.manual_seed(4)
    theirs.orthogonal_init("default")
    torch.testing.assert_close(theirs.lora_A["default"].weight.data, expected[0])
    torch.testing.assert_close(theirs.lora_B["default"].weight.data, expected[1])
    torch.testing.assert_close(module.lora_down.weight.std(), down.std(), atol=0.06, rtol=0)
    torch.testing.assert_close(module.lora_up.weight.std(), up.std(), atol=0.06, rtol=0)


@pytest.mark.parametrize("axis, layer, shape", [(1, *LAYERS[0]), *((0, *case) for case in LAYERS)], ids=["inputs", *IDS])
def test_dora_is_pefts_forward_and_gradients(axis, layer, shape):
    """peft has a norm for each output. Ours for each input is peft's of the transposed layer (for Linear; see the next test)."""
    torch.manual_seed(0)
    mine, module = ours(DoRAModule, layer, 4, 2.0)
    nn.init.normal_(module.lora_up.weight, std=0.2)
    x = torch.randn(shape)
    if axis == 0:
        module.dora_scale = nn.Parameter(
            layer.weight.detach().flatten(1).norm(dim=1).view(-1, *[1] * (layer.weight.dim() - 1)) * 1.1
        )
        theirs = peft_layer(layer, 4, 2.0, use_dora=True)
        set_peft(theirs, module.lora_up.weight.data, module.lora_down.weight.data)
        magnitude = theirs.lora_magnitude_vector["default"]
        magnitude.weight.data = module.dora_scale.data.view_as(magnitude.weight).clone()
        y, wanted = mine(x), theirs(x)
        torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
        (y**2).sum().backward(), (wanted**2).sum().backward()
        pairs = [
            (module.lora_up.weight, theirs.lora_B["default"].weight),
            (module.lora_down.weight, theirs.lora_A["default"].weight),
        ]
        for a, b in [*pairs, (module.dora_scale, magnitude.weight)]:
            torch.testing.assert_close(a.grad, b.grad.view_as(a), atol=1e-3, rtol=1e-3)
        return
    turned = nn.Linear(10, 12, bias=False)
    turned.weight.data = layer.weight.data.T.clone()
    theirs = peft_layer(turned, 4, 2.0, use_dora=True)
    set_peft(theirs, module.lora_down.weight.data.T, module.lora_up.weight.data.T)
    module.dora_scale.data *= 1.1
    theirs.lora_magnitude_vector["default"].weight.data *= 1.1
    merged = theirs(torch.eye(10)).detach()  # the rows of W'
    torch.testing.assert_close(mine(x), x @ merged.T + layer.bias, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer, shape", LAYERS, ids=IDS)
def test_dora_is_the_papers_formula_with_a_norm_for_each_input(layer, shape):
    torch.manual_seed(0)
    mine, module = ours(DoRAModule, layer, 4, 2.0)
    x = torch.randn(shape)
    torch.testing.assert_close(mine(x), layer(x), atol=1e-5, rtol=1e-4)  # the start
    assert tuple(module.dora_scale.shape) == (1, 12, *[1] * (layer.weight.dim() - 2))
    nn.init.normal_(module.lora_up.weight, std=0.2)
    module.dora_scale.data *= 1.2
    delta = 0.5 * torch.einsum("or,r...->o...", module.lora_up.weight.flatten(1), module.lora_down.weight)
    changed = layer.weight + delta
    columns = changed.transpose(0, 1).flatten(1).norm(dim=1).view(module.dora_scale.shape)
    reference = copy.deepcopy(layer)
    reference.weight.data = (module.dora_scale * changed / columns).detach()
    torch.testing.assert_close(mine(x), reference(x), atol=1e-5, rtol=1e-4)
    module.multiplier = 0.5
    torch.testing.assert_close(mine(x), (reference(x) + layer(x)) / 2, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- networks and files


@pytest.mark.parametrize("words", [{"init": "pissa"}, {"init": "orthogonal"}, {"dora": "True"}, {"rs_lora": "True"}], ids=str)
@pytest.mark.parametrize("fixture, other", [("model", "linear_model"), ("linear_model", "model")])
def test_files_work_on_the_unchanged_model_applied_and_merged(fixture, other, words, request, tmp_path):
    model = request.getfixturevalue(fixture)
    base, before = outputs(model), model.weights()
    fresh = make_network(model, trained=False, **words, **CONV)
    fresh.apply_to(model.text_encoder, model.unet)
    torch.testing.assert_close(outputs(model), base, atol=3e-5, rtol=1e-3)  # the start is the model
    fresh.unapply()
    network = make_network(model, **words, **CONV)
    network.apply_to(model.text_encoder, model.unet)
    trained = outputs(model)
    network.unapply()
    assert torch.equal(outputs(model), base) and all(torch.equal(a, b) for a, b in zip(before, model.weights(), strict=True))
    file = tmp_path / "a.safetensors"
    network.save_weights(file, None, {"ss_network_dim": "4", "ss_network_alpha": "2.0"})
    loaded, weights = create_network_from_weights(1.0, file, None, model.text_encoder, model.unet)
    loaded.load_state_dict(weights)
    loaded.eval().apply_to(model.text_encoder, model.unet)
    assert (trained - base).abs().max() > 0.05
    torch.testing.assert_close(outputs(model), trained, atol=3e-5, rtol=1e-3)
    loaded.unapply()
    loaded.merge_to(model.text_encoder, model.unet, weights)
    torch.testing.assert_close(outputs(model), trained, atol=3e-5, rtol=1e-3)
    target = request.getfixturevalue(other)  # projections 2-D and 4-D
    exchanged, weights = create_network_from_weights(1.0, file, None, target.text_encoder, target.unet)
    exchanged.load_state_dict(weights)


@pytest.mark.parametrize(
    "words, rank, alpha", [({"init": "pissa"}, "8", "4.0"), ({"dora": "1"}, "4", "4.0"), ({"rs_lora": "1"}, "4", "4.0")]
)
def test_the_metadata_has_the_files_rank_and_alpha(model, tmp_path, words, rank, alpha):
    from safetensors import safe_open

    network = make_network(model, **words)
    network.save_weights(tmp_path / "a.safetensors", None, {"ss_network_dim": "4", "ss_network_alpha": "2.0"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert (file.metadata()["ss_network_dim"], file.metadata()["ss_network_alpha"]) == (rank, alpha)
        name = network.loras[0].lora_name
        assert len(file.get_tensor(f"{name}.lora_down.weight")) == int(rank)
        assert file.get_tensor(f"{name}.alpha").item() == float(alpha)


@pytest.mark.parametrize("words", [{"init": "pissa"}, {"dora": "True"}], ids=str)
def test_going_on_from_a_file_and_from_a_state(model, tmp_path, words):
    network = make_network(model, **words)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    network.apply_to(model.text_encoder, model.unet)
    expected = outputs(model)
    network.unapply()
    for load in (lambda n: n.load_weights(tmp_path / "a.safetensors"), lambda n: n.load_state_dict(network.state_dict())):
        other = make_network(model, trained=False, **words)
        load(other)
        other.apply_to(model.text_encoder, model.unet)
        torch.testing.assert_close(outputs(model), expected, atol=3e-5, rtol=1e-3)
        other.unapply()


def test_files_of_another_kind_are_refused_by_name(model, tmp_path):
    plain, dora = make_network(model), make_network(model, dora="True")
    plain.save_weights(tmp_path / "plain.safetensors", None, None)
    dora.save_weights(tmp_path / "dora.safetensors", None, None)
    with pytest.raises(ValueError, match="is a DoRA in the weights; use --dim_from_weights or --network_args dora=True"):
        make_network(model).load_weights(tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match="is no DoRA in the weights; leave out dora=True"):
        make_network(model, dora="True").load_weights(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="is not from a run with init=pissa"):
        make_network(model, init="pissa").load_weights(tmp_path / "plain.safetensors")


@pytest.mark.parametrize(
    "words, message",
    [
        ({"init": "pisa"}, "network_args init=pisa: give one of default, pissa, orthogonal"),
        ({"dora": "maybe"}, "network_args dora=maybe: give True or False"),
        ({"dora": "True", "init": "pissa"}, "init=pissa and dora=True cannot be combined"),
        ({"init": "orthogonal", "conv_dim": "3"}, "init=orthogonal needs even ranks; .* has rank 3"),
    ],
)
def test_wrong_words(model, words, message):
    with pytest.raises(ValueError, match=message):
        make_network(model, **words)


def test_all_are_off_by_default_and_can_be_switched_off(model):
    for words in ({}, {"init": "default", "dora": "False", "rs_lora": "False"}):
        assert {type(module) for module in make_network(model, **words).loras} == {SuiteModule}
    assert make_network(model, trained=False, init="default").state_dict().keys() == make_network(model).state_dict().keys()


def test_dora_trains_its_magnitudes_also_with_loraplus(model):
    for words in ({}, {"loraplus_lr_ratio": "4"}):
        network = make_network(model, dora="True", **words)
        groups, _ = network.prepare_optimizer_params(None, None, 1e-3)
        assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in network.parameters()}
    network.apply_to(model.text_encoder, model.unet)
    network.train()
    model.run()[1].square().sum().backward()
    gradients = torch.stack([module.dora_scale.grad.abs().max() for module in network.parts["lora_unet"]])
    assert gradients.min() > 1e-6 * gradients.median()  # more than rounding


def test_dropouts_with_dora_and_pissa_still_run(model):
    for words in ({"dora": "True"}, {"init": "pissa"}):
        network = make_network(model, dropout="0.2", rank_dropout="0.2", module_dropout="0.2", **words)
        network.apply_to(model.text_encoder, model.unet)
        network.train()
        model.run()[1].square().sum().backward()
        network.unapply()


# As ComfyUI (comfy/weight_adapter/base.py) and the A1111 web UI (extensions-builtin/Lora/network.py) compute with these tensors.


def comfyui(weight, up, down, alpha, dora_scale):
    changed = weight + alpha / len(down) * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    assert dora_scale.shape[0] != weight.shape[0]  # else it would divide by the norms of the unchanged weight
    norms = changed.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (weight.dim() - 2))
    return changed * (dora_scale / norms)


def a1111(weight, up, down, alpha, dora_scale):
    changed = weight + (up.flatten(1) @ down.flatten(1)).view(weight.shape)  # without the scale
    norms = changed.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (weight.dim() - 2))
    return weight + alpha / len(down) * (changed * (dora_scale / norms) - weight)


@pytest.mark.parametrize("loader", [comfyui, a1111])
def test_dora_files_give_the_same_weights_in_the_uis(model, loader, tmp_path):
    network = make_network(model, dora="True", **CONV)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    weights = SuiteNetwork.read(tmp_path / "a.safetensors")
    layers = networks.lora.find_layers(model.text_encoder, model.unet, conv3x3=True)
    for module in network.loras:
        name, weight = module.lora_name, layers[module.lora_name].weight
        tensors = [weights[f"{name}.{key}"] for key in ("lora_up.weight", "lora_down.weight", "alpha", "dora_scale")]
        expected = weight + DoRAModule.weight_change(weights, name, layers[name])
        torch.testing.assert_close(loader(weight, *tensors), expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def registry():
    before = list(VARIANTS)
    yield
    VARIANTS[:] = before


def test_a_variant_is_one_class_with_no_edit_elsewhere(model, tmp_path, registry):
    @register
    class Biased(Variant):
        """A LoRA that adds a number of its own to the weight."""

        title, word = "biased LoRA", "biased"
        own_tensors = ("bias_of_weight",)

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.bias_of_weight = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            layer = self.lora_down
            ones = torch.ones(len(self.lora_up.weight), *layer.weight.shape[1:]) * self.bias_of_weight
            if isinstance(layer, nn.Conv2d):
                added = nn.functional.conv2d(x, ones, None, layer.stride, layer.padding, layer.dilation)
            else:
                added = nn.functional.linear(x, ones)
            return super().forward(x) + added * self.multiplier

        def from_file(self, weights):
            return super().from_file(weights) | {"bias_of_weight": weights[f"{self.lora_name}.bias_of_weight"]}

        @classmethod
        def weight_change(cls, weights, name, layer, device=None):
            return super().weight_change(weights, name, layer, device) + weights[f"{name}.bias_of_weight"]

    base = outputs(model)
    network = make_network(model, biased="True", rs_lora="True", **CONV)
    assert all(isinstance(module, Biased) and module.scale in (1.0, 1.5) for module in network.loras)
    network.apply_to(model.text_encoder, model.unet)
    trained = outputs(model)
    network.unapply()
    assert (trained - base).abs().max() > 0.05
    file = tmp_path / "a.safetensors"
    network.save_weights(file, None, None)
    loaded, weights = create_network_from_weights(1.0, file, None, model.text_encoder, model.unet)
    loaded.load_state_dict(weights)
    assert {type(module) for module in loaded.loras} == {Biased}
    with pytest.raises(ValueError, match="is a biased LoRA in the weights; .* --network_args biased=True"):
        make_network(model, **CONV).load_weights(file)
    with pytest.raises(ValueError, match="dora=True and biased=True cannot be combined"):
        make_network(model, dora="True", biased="True")
    loaded.merge_to(model.text_encoder, model.unet, weights)
    torch.testing.assert_close(outputs(model), trained, atol=3e-5, rtol=1e-3)
