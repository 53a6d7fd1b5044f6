"""library/generation/extras/networks.py: networks on a model that makes images."""

from __future__ import annotations

import logging
import unicodedata
import warnings
from dataclasses import replace

import pytest
import torch
from reference_pipelines import make_pipeline, run_pipeline
from safetensors.torch import load_file, save_file

from library.diffusion.process import NoiseProcess
from library.diffusion.samplers import SAMPLERS, make_scheduler
from library.errors import UserError
from library.generation.extras.networks import Networks
from library.generation.options import NetworkOptions
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.loras import PromptLoras, split_loras
from library.generation.prompts.spec import PromptSpec
from networks import dylora, lora

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CAT = PromptSpec("a photo of a cat", "blurry", width=64, height=64, seed=7, scale=5.0, steps=2)
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def write_lora(path, model, seed=0, module=lora, **network_args):
    """A LoRA strong enough to be seen, with 3x3 convolutions."""
    torch.manual_seed(seed)
    network_args = network_args or {"conv_dim": "4", "conv_alpha": "4"}
    network = module.create_network(1.0, 4, 4, None, model.text_encoders[0], model.denoiser, **network_args)
    for part in network.loras:
        torch.nn.init.normal_(part.lora_up.weight, std=0.1)
    network.save_weights(path, torch.float32, {})
    return path


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    (folder / "inner").mkdir()
    with torch.random.fork_rng():
        write_lora(folder / "ink.safetensors", model, 1)
        write_lora(folder / "inner" / "oil.safetensors", model, 2)
    return [folder / "ink.safetensors", folder / "inner" / "oil.safetensors"]


@pytest.fixture
def load(model):
    """`Networks.load` on the model, which is as it was after the test."""
    weights = {part: [value.clone() for value in model.parts[part].parameters()] for part in ("text_encoder", "unet")}
    loaded = []

    def run(files, multipliers=None, modules=("networks.lora",), args=None, **options):
        given = {"network_module": list(modules) if files else None, "network_mul": multipliers, "network_args": args, **options}
        loaded.append(Networks.load(model, NetworkOptions(network_weights=[str(file) for file in files], **given)))
        return loaded[-1]

    yield run
    for networks in reversed(loaded):
        networks.close()
    with torch.no_grad():
        for part, values in weights.items():
            for parameter, value in zip(model.parts[part].parameters(), values, strict=True):
                parameter.copy_(value)


def test_loras_are_read_from_prompts():
    assert split_loras("a cat <lora:ink:0.8>, sitting") == ("a cat , sitting", (("ink", 0.8),))
    assert split_loras("<lora:a.b-c> x <LORA:d:-1.5>") == ("x", (("a.b-c", 1.0), ("d", -1.5)))
    assert split_loras("a <lora:ink:\u22120.5>")[1] == (("ink", -0.5),)
    assert split_loras("a < b, <b:c>") == ("a < b, <b:c>", ())
    for wrong in ("strong", "0.5:1"):
        with pytest.raises(UserError, match=f"<lora:ink:{wrong}>: '{wrong}' is not a strength"):
            split_loras(f"a <lora:ink:{wrong}>")


@pytest.fixture(scope="module")
def with_ink_by_diffusers(model, files):
    """Diffusers' pipeline with `load_lora_weights`, the LoRA at strength 1: sampler -> latents."""
    from reference_pipelines import SMALL

    from library.testing import small_stable_diffusion

    pipe = make_pipeline("", small_stable_diffusion(seed=0, **SMALL), make_scheduler("ddim", NoiseProcess()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(files[0])

    def latents(sampler):
        pipe.scheduler = make_scheduler(sampler, NoiseProcess())
        return run_pipeline(pipe, CAT, height=64, width=64)

    return latents


@pytest.mark.parametrize("way", ["applied", "merged", "pre_calc"])
def test_latents_equal_those_of_diffusers_load_lora_weights(model, files, load, latents_of, with_ink_by_diffusers, way):
    without = latents_of(model, [CAT])[0]
    networks = load(files[:1], network_merge=way == "merged", network_pre_calc=way == "pre_calc")
    ours = latents_of(model, [CAT], networks=networks)[0]
    assert (ours - without).abs().max() > 0.1
    torch.testing.assert_close(ours, with_ink_by_diffusers("ddim"), **CLOSE)


def test_latents_equal_those_of_load_lora_weights_with_every_sampler(model, files, load, latents_of, with_ink_by_diffusers):
    names = [name for name in SAMPLERS if not name.startswith("k_")]
    specs = [replace(CAT, sampler=name) for name in names]
    for name, ours in zip(names, latents_of(model, specs, networks=load(files[:1])), strict=True):
        torch.testing.assert_close(ours, with_ink_by_diffusers(name), msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


@pytest.mark.parametrize("pre_calc", [False, True])
def test_strengths_change_from_image_to_image_and_the_model_comes_back_bit_for_bit(model, files, load, latents_of, pre_calc):
    before = [value.clone() for part in (model.text_encoders[0], model.denoiser) for value in part.parameters()]
    none = latents_of(model, [CAT])[0]
    networks = load(files, [0.5], network_pre_calc=pre_calc)
    specs = [replace(CAT, multipliers=m) for m in (None, (0.5, 1.0), (0.0,), (1.0, -0.7), (0.0, 0.0), (1.0, -0.7))]
    default, same, off, other, off_again, other_again = latents_of(model, specs, networks=networks, batch_size=3)
    assert torch.equal(off, none) and torch.equal(off_again, none)
    assert torch.equal(default, same) and torch.equal(other, other_again)
    assert (default - none).abs().max() > 0.1 and (default - other).abs().max() > 0.1
    networks.close()
    after = [value for part in (model.text_encoders[0], model.denoiser) for value in part.parameters()]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert torch.equal(latents_of(model, [CAT])[0], none)


def test_pre_calc_computes_once_for_each_change(model, files, load, monkeypatch):
    networks = load(files, network_pre_calc=True)
    merges = []
    monkeypatch.setattr(networks, "merge", lambda loaded, strength: merges.append(strength))
    one, other = CAT, replace(CAT, multipliers=(0.5,))
    for spec in (one, one, other, other, other, one):
        networks.set(networks.multipliers(spec))
    assert merges == [0.5, 0.5, 1.0, 1.0]


def test_the_first_can_be_merged_and_the_rest_applied(model, files, load, latents_of):
    networks = load(files, [0.6, 0.8])
    applied = latents_of(model, [CAT], networks=networks)[0]
    networks.close()
    networks = load(files, [0.6, 0.8], network_merge_n_models=1)
    torch.testing.assert_close(latents_of(model, [CAT], networks=networks)[0], applied, **CLOSE)
    assert networks.defaults == (0.8,)
    assert networks.used(CAT) == [(files[0], 0.6), (files[1], 0.8)]


def test_loras_in_prompts_equal_the_same_on_the_command_line(model, files, load, latents_of):
    networks = load([], lora_dir=str(files[0].parent))
    specs = [replace(CAT, prompt=CAT.prompt + ending) for ending in (" <lora:ink:0.8>", "", " <lora:ink:0.8><lora:oil>")]
    ink, none, both = latents_of(model, specs, networks=networks, batch_size=3)
    assert networks.used(specs[2]) == [(files[0], 0.8), (files[1], 1.0)]
    networks.close()
    assert torch.equal(none, latents_of(model, [CAT])[0])
    on_command_line = load(files, [0.8, 1.0])
    both_again, ink_again = latents_of(model, [CAT, replace(CAT, multipliers=(0.8, 0.0))], networks=on_command_line)
    torch.testing.assert_close(both, both_again, **CLOSE)
    torch.testing.assert_close(ink, ink_again, **CLOSE)
    assert (ink - none).abs().max() > 0.1 and (both - ink).abs().max() > 0.1


def test_a_prompts_lora_is_found_in_either_form_of_an_accent(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    (tmp_path / f"{decomposed}.safetensors").touch()
    loras = PromptLoras(tmp_path)
    assert loras.find(composed) == loras.find(decomposed) and loras.find(composed).exists()


def test_a_prompts_lora_is_read_once(model, files, load, monkeypatch):
    networks = load([], lora_dir=str(files[0].parent))
    reads = []
    read = networks.read
    monkeypatch.setattr(networks, "read", lambda path, *rest: reads.append(path) or read(path, *rest))
    spec = replace(CAT, prompt="a cat <lora:ink:0.8>", steps=1)
    assert (
        len(
            list(
                Pipeline(model, GenerateSettings(networks=networks)).generate(
                    [spec, replace(spec, prompt="<lora:ink:0.2>"), spec]
                )
            )
        )
        == 3
    )
    assert reads == [files[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a <lora:inc:1>"}, "unknown LoRA 'inc' in .*did you mean 'ink'"),
        ({"multipliers": (1.0, 1.0)}, "--am gives 2 strengths for 1 network"),
        ({"negative_prompt": "<lora:ink>"}, "belongs into the prompt"),
    ],
)
def test_wrong_requests_are_one_line_and_the_rest_goes_on(model, files, load, options, message):
    networks = load(files[:1], lora_dir=str(files[0].parent))
    failed = []
    specs = [replace(CAT, steps=1, **options), replace(CAT, steps=1)]
    made = list(
        Pipeline(model, GenerateSettings(networks=networks)).generate(specs, on_error=lambda one: failed.append(str(one.error)))
    )
    assert len(made) == 1 and len(failed) == 1
    with pytest.raises(UserError, match=message):
        list(Pipeline(model, GenerateSettings(networks=networks)).generate(specs))


def test_a_lora_in_a_prompt_without_a_folder_says_so(model, load):
    with pytest.raises(UserError, match="<lora:ink>.*--lora_dir"):
        list(Pipeline(model, GenerateSettings(networks=load([]))).generate([replace(CAT, prompt="a <lora:ink:1>")]))


def test_a_missing_strength_is_one_and_a_surplus_is_an_error(files, load):
    assert load(files, [0.3]).defaults == (0.3, 1.0)
    for wrong, message in (
        ({"multipliers": [1, 1, 1]}, "--network_mul has 3 values for 2"),
        ({"modules": ["networks.lora"] * 3}, "--network_module has 3 names for 2"),
        ({"args": ["a=1", "", ""]}, "--network_args has 3 values for 2"),
        ({"network_merge_n_models": 3}, "is more than --network_weights has; give at most 2"),
        ({"args": ["rank"]}, "expected key=value, got 'rank'"),
        ({"args": ["rnk_dropout=0.1"]}, "did you mean 'rank_dropout'"),
        ({"modules": ["networks.lor"]}, "did you mean 'networks.lora'"),
        ({"lora_dir": "nowhere"}, "--lora_dir nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            load(files, **wrong)


def test_trap_53_a_lora_that_was_trained_on_another_kind_of_base_is_named(files, load, tmp_path, caplog):
    facts = {"ss_base_model_version": "sd_v1_v", "ss_sd_model_name": "velocity.safetensors"}
    save_file(load_file(files[0]), tmp_path / "v.safetensors", facts)
    load([files[0], tmp_path / "v.safetensors"])
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(f"{tmp_path / 'v.safetensors'} was trained on velocity.safetensors that predicts velocity")


def test_trap_3_6_files_of_dylora_load_with_both_modules(model, load, latents_of, tmp_path):
    with torch.random.fork_rng():
        file = write_lora(tmp_path / "dy.safetensors", model, 3, dylora, unit="2")
    results = []
    for module in ("networks.dylora", "networks.lora"):
        networks = load([file], modules=[module])
        results.append(latents_of(model, [CAT], networks=networks)[0])
        networks.close()
    torch.testing.assert_close(*results, **CLOSE)
    assert (results[0] - latents_of(model, [CAT])[0]).abs().max() > 0.05


@pytest.mark.parametrize("layout", ["peft", "old"])
def test_files_in_diffusers_layouts(model, files, load, latents_of, tmp_path, layout):
    """The same numbers under the names that Diffusers writes."""
    sides = {"lora_down": "lora_A", "lora_up": "lora_B"} if layout == "peft" else {"lora_down": "lora.down", "lora_up": "lora.up"}
    paths = {name.replace(".", "_"): f"unet.{name}" for name, _ in model.denoiser.named_modules()}
    renamed = {}
    for key, tensor in load_file(files[0]).items():
        name, _, rest = key.partition(".")
        side = rest.partition(".")[0]
        if name.startswith("lora_unet_") and side in sides:
            renamed[f"{paths[name.removeprefix('lora_unet_')]}.{sides[side]}.weight"] = tensor
    save_file(renamed, tmp_path / "diffusers.safetensors")
    unet_only = {key: tensor for key, tensor in load_file(files[0]).items() if key.startswith("lora_unet_")}
    save_file(unet_only, tmp_path / "kohya.safetensors")
    results = []
    for name in ("diffusers", "kohya"):
        networks = load([tmp_path / f"{name}.safetensors"])
        results.append(latents_of(model, [CAT], networks=networks)[0])
        networks.close()
    torch.testing.assert_close(*results, **CLOSE)


def test_a_lora_of_another_family_is_named_in_one_line(load, tmp_path):
    layer = "lora_unet_down_blocks_0_attentions_0_proj_in"
    wide = {f"{layer}.lora_down.weight": torch.zeros(4, 5), f"{layer}.lora_up.weight": torch.zeros(7, 4)}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"--network_weights .*wide.safetensors: lora_\w+: .*another Stable Diffusion version"):
        load([tmp_path / "wide.safetensors"])
    for key, family in (("lora_te2_x.lora_down.weight", "SDXL"), ("lora_unet_x.hada_w1_a", "LoHa")):
        save_file({key: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=f"other.safetensors: .*{family}"):
            load([tmp_path / "other.safetensors"])
    with pytest.raises(UserError, match="there is no such file"):
        load([tmp_path / "missing.safetensors"])


def test_metadata_are_shown(files, load, capsys):
    load(files[:1], network_show_meta=True)
    assert "ink.safetensors: {" in capsys.readouterr().out


def test_a_network_of_another_module_that_cannot_be_merged_says_so(model, files, load, monkeypatch):
    monkeypatch.setattr(lora.LoRANetwork, "is_mergeable", lambda self: False)
    with pytest.raises(UserError, match="cannot be merged"):
        load(files[:1], network_merge=True)


def test_unused_weights_are_reported(files, load, tmp_path, caplog):
    save_file({**load_file(files[0]), "lora_unet_nowhere.alpha": torch.ones(())}, tmp_path / "more.safetensors")
    with caplog.at_level(logging.WARNING):
        load([tmp_path / "more.safetensors"])
    assert "lora_unet_nowhere.alpha" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"network_merge": True}, {"network_pre_calc": True}])
def test_a_lora_that_is_not_finite_is_named_with_its_key_and_the_cure(files, load, tmp_path, value, options):
    tensors = load_file(files[0])
    key = next(name for name in reversed(tensors) if name.endswith("lora_up.weight"))
    tensors[key].view(-1)[-1] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError) as caught:
        load([tmp_path / "bad.safetensors"], **options)
    assert f"bad.safetensors: {key} holds NaN or infinity" in str(caught.value)
    assert str(caught.value).endswith("; take an earlier file of the same training, or fetch it again")
