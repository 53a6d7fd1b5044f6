"""Options through whole runs on the small model: each changes what it says, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from small_runs import Recorder

from library.data.dataset import TrainingDataset
from library.testing import small_stable_diffusion
from library.training import setup
from library.training.checks.contradictions import contradictions
from library.training.memory.frozen import FrozenConv2d, FrozenLinear
from library.training.memory.packing import PackedConv2d, PackedLinear
from library.training.memory.placement import offload_idle_parts, pack_frozen_weights
from library.training.memory.precision import NumberFormats
from library.training.options import parse_options

NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]
CPU = torch.device("cpu")
QUICK = ["--max_train_steps=2", "--network_train_unet_only", "--network_dim=1"]


@pytest.fixture
def recorder() -> Recorder:
    """A listener that keeps the runs to which it is given."""
    return Recorder()


def packed(module: torch.nn.Module) -> int:
    return sum(isinstance(layer, (PackedConv2d, PackedLinear)) for layer in module.modules())


@pytest.mark.option("fp8_base", "torch_compile", "dynamo_backend", "fused_backward_pass")
def test_trap_45_fused_and_packed_and_compiled_runs_do_as_the_plain_one(run, recorder, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, backend: compiled.append((type(self).__name__, backend)))
    words = [*QUICK, "--max_grad_norm=0"]
    plain, fused = (run(*words, *more, recorder).tensors() for more in ([], ["--fused_backward_pass"]))
    assert all(torch.equal(plain[key], fused[key]) for key in plain)
    assert not compiled and not packed(recorder.runs[-1].model.denoiser)
    assert [bool(t.network.parameters[0]._post_accumulate_grad_hooks) for t in recorder.runs] == [False, True]
    capsys.readouterr()
    other = run(*words, "--fp8_base", "--gradient_checkpointing", "--torch_compile", "--dynamo_backend=eager", recorder).tensors()
    assert set(compiled) == {("BasicTransformerBlock", "eager")}
    assert packed(recorder.runs[-1].model.denoiser) > 100 and packed(recorder.runs[-1].model.text_encoders[0]) > 5
    assert "frozen weights in fp8" in capsys.readouterr().out
    ups = [torch.cat([t.flatten() for k, t in tensors.items() if "lora_up" in k]) for tensors in (plain, other)]
    assert torch.cosine_similarity(*ups, dim=0) > 0.5 and not torch.equal(*ups)


def test_a_run_freezes_its_layers_unless_a_compiler_does_more(run, recorder, monkeypatch, by_onednn):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, backend: compiled.append(type(self).__name__))
    for words in ([], ["--torch_compile", "--dynamo_backend=eager"], ["--torch_compile", "--dynamo_backend=cudagraphs"]):
        run(*QUICK, *words, recorder)
    assert [type(made.model.denoiser.conv_in) is FrozenConv2d for made in recorder.runs] == [True, True, False]
    for parts in (lambda model: [model.denoiser], lambda model: model.text_encoders):
        kinds = [{type(layer) for part in parts(made.model) for layer in part.modules()} for made in recorder.runs]
        assert [FrozenLinear in found for found in kinds] == [by_onednn, by_onednn, False]
    assert compiled[-1] == "UNet2DConditionModel" and set(compiled[:-1]) == {"BasicTransformerBlock"}


def pack(model, *words: str) -> None:
    chosen = parse_options([*NEEDED, *words])
    formats = NumberFormats.of(chosen.training, chosen.precision)
    pack_frozen_weights(formats, model, CPU, chosen.training.gradient_checkpointing)


@pytest.mark.option("fp8_base_unet")
def test_fp8_base_unet_leaves_the_text_encoder(capsys):
    model = small_stable_diffusion(unet_channels=(32, 32, 64, 64), vae_channels=(32, 32, 32, 32), text_width=32, text_layers=1)
    pack(model)
    assert not packed(model.denoiser) and not capsys.readouterr().out
    pack(model, "--fp8_base_unet")
    assert packed(model.denoiser) > 100 and not packed(model.text_encoders[0])
    assert "frozen weights in fp8" in (said := capsys.readouterr().out) and "save memory" not in said


def test_a_network_that_takes_the_place_of_layers_is_asked_to_checkpoint(capsys):
    model = small_stable_diffusion(unet_channels=(32, 32, 64, 64), vae_channels=(32, 32, 32, 32), text_width=32, text_layers=1)
    model.denoiser.conv_in.forward = lambda x: x  # as LyCORIS does
    pack(model, "--base_dtype=int8", "--gradient_checkpointing")
    assert "save memory" not in capsys.readouterr().out
    pack(model, "--base_dtype=int8")
    assert "add --gradient_checkpointing to save memory" in capsys.readouterr().out


def test_full_bf16_trains_and_saves_bf16(run):
    words = ["--max_train_steps=1", "--network_train_unet_only", "--cache_latents", "--network_dim=1", "--full_bf16"]
    tensors = run(*words, "--mixed_precision=bf16").tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert any(tensor.any() for key, tensor in tensors.items() if "lora_up" in key)


class _Part:
    """A part of a model that notes where it is moved to."""

    def __init__(self):
        self.moved: list[str] = []

    def to(self, where: str):
        self.moved.append(where)


@pytest.mark.option("lowram", "highvram")
@pytest.mark.parametrize("words, moved", [([], ["cpu"]), (["--lowram"], []), (["--highvram"], [])])
def test_parts_that_previews_need_leave_the_gpu_unless_asked_otherwise(words, moved):
    class Model:
        vae, text_encoders = _Part(), [_Part()]

    offload_idle_parts(parse_options([*NEEDED, *words]).precision, [Model.vae, *Model.text_encoders], keep_for_previews=True)
    assert Model.vae.moved == Model.text_encoders[0].moved == moved


@pytest.mark.parametrize("words", [[], ["--lowram"], ["--highvram"]])
def test_parts_that_nothing_needs_any_more_are_freed(words):
    class Model:
        vae, text_encoders = _Part(), [_Part()]

    offload_idle_parts(parse_options([*NEEDED, *words]).precision, [Model.vae], keep_for_previews=False)
    assert (Model.vae.moved, Model.text_encoders[0].moved) == (["meta"], [])


def load(device: torch.device, *words: str) -> None:
    chosen = parse_options([*NEEDED, *words])
    setup.load_model(chosen.model, NumberFormats.of(chosen.training, chosen.precision), device)


@pytest.mark.option("vae")
def test_models_go_straight_to_the_device_in_the_format_of_the_arithmetic(monkeypatch):
    class Stop(Exception):
        pass

    seen = {}

    def load_stable_diffusion(name, **more):
        seen.update(more)
        raise Stop

    monkeypatch.setattr(setup, "load_stable_diffusion", load_stable_diffusion)

    device = torch.device("cuda", 0)
    with pytest.raises(Stop):  # packed weights alone go there
        load(device, "--base_dtype=int8")
    assert seen["device"] == torch.device("cpu")
    with pytest.raises(Stop):
        load(device, "--lowram", "--mixed_precision=bf16", "--vae=other")
    assert seen["vae"] == "other" and seen["device"] == device and seen["dtype"] == torch.bfloat16


@pytest.mark.option("mem_eff_attn", "xformers")
@pytest.mark.parametrize(
    "words, asked", [(["--xformers"], True), (["--xformers", "--mem_eff_attn"], False), (["--xformers", "--sdpa"], True)]
)
def test_mem_eff_attn_wins_over_xformers(monkeypatch, words, asked):
    calls = []
    monkeypatch.setattr(setup, "load_stable_diffusion", lambda *a, **k: type("Model", (), {"denoiser": None}))
    monkeypatch.setattr(setup, "use_xformers", lambda *a: calls.append(a))
    load(CPU, *words)
    assert bool(calls) == asked


@pytest.mark.option("sdpa")
def test_attention_is_torch_s_which_keeps_no_matrix_of_all_pairs(base_model):
    from library.models.loading import load_stable_diffusion

    model = load_stable_diffusion(str(base_model))
    processors = {type(p).__name__ for p in model.denoiser.attn_processors.values()}
    assert processors == {"AttnProcessor2_0"}


# ---------------------------------------------------------------- masks and metadata files


@pytest.mark.option("conditioning_data_dir", "masked_loss")
def test_what_is_masked_out_makes_no_loss(run, recorder, images, tmp_path):
    for image in images.glob("*.png"):
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.new("L", (64, 64), 0).save(tmp_path / "masks" / image.name)
    run("--max_train_steps=1", *QUICK[1:], "--masked_loss", f"--conditioning_data_dir={tmp_path / 'masks'}", recorder)
    assert recorder.runs[-1].losses.values == [0.0]


@pytest.mark.option(
    "in_json",
    "on_bad_image",
    "cache_latents_to_disk",
    "vae_batch_size",
    "persistent_data_loader_workers",
    "max_data_loader_n_workers",
    "network_alpha",
)
def test_in_json_trains_on_what_it_lists(run, recorder, tmp_path, monkeypatch):
    loaders, caches = [], []
    make_loader, cache = setup.make_loader, TrainingDataset.cache_latents
    monkeypatch.setattr(setup, "make_loader", lambda *a, **more: loaders.append(more) or make_loader(*a, **more))
    monkeypatch.setattr(TrainingDataset, "cache_latents", lambda self, *a, **more: caches.append(more) or cache(self, *a, **more))
    see_through = tmp_path / "clear.png"
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(see_through)
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({str(see_through): {"caption": "c", "tags": "t"}, "missing": {}}), encoding="utf-8")
    words = [
        f"--in_json={path}",
        "--on_bad_image=skip",
        "--alpha_mask",
        "--cache_latents_to_disk",
        "--vae_batch_size=2",
        "--network_alpha=3",
    ]
    words += ["--persistent_data_loader_workers", "--max_data_loader_n_workers=0"]
    result = run("--max_train_steps=1", *QUICK[1:], *words, recorder, data="--train_batch_size=1")
    assert loaders[0]["persistent"] and loaders[0]["num_workers"] == 0
    assert caches[0]["batch_size"] == 2 and caches[0]["to_disk"] and len(list((tmp_path / ".latents").iterdir())) == 1
    assert {tensor.item() for key, tensor in result.tensors().items() if key.endswith(".alpha")} == {3.0}
    made = recorder.runs[-1]
    assert made.data.train[(1, 0)].captions == ["c, t"] and made.losses.values == [0.0]
    metadata = result.metadata()
    assert json.loads(metadata["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 1, "img_count": 1}}
    assert json.loads(metadata["ss_tag_frequency"]) == {"meta.json": {"t": 1}}


@pytest.mark.parametrize(
    "words, part",
    [
        (["--conditioning_data_dir=x"], "masks for --masked_loss"),
        (["--conditioning_data_dir=x", "--masked_loss", "--dataset_config=y"], "write conditioning_data_dir into the subset"),
        (["--in_json=x", "--reg_data_dir=y"], "as two"),
    ],
)
def test_what_does_not_go_together_is_reported(words, part):
    (problem,) = contradictions(parse_options([*NEEDED, *words]))
    assert part in problem
