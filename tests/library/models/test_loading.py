from __future__ import annotations

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models import loading
from library.models.clip import encode_text, tokenize
from library.models.loading import ModelReading, load_stable_diffusion, load_vae
from library.models.modules import weights_fingerprint, weights_of

PARTS = ("text_encoder", "vae", "unet")


def assert_same_weights(first, second):
    for part in PARTS:
        ours, theirs = first.parts[part].state_dict(), second.parts[part].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items()), part


@pytest.fixture
def tensors(saved_models):
    """The small SD 1's CompVis tensors, to be changed at will."""
    return load_file(saved_models[False, "model.safetensors"])


@pytest.mark.parametrize("with_vae", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_that_threads_have_begun_to_read_gives_the_same_model(saved_models, with_vae, dtype):
    path, vae = saved_models[False, "model.safetensors"], None if with_vae else str(saved_models[True, "model.safetensors"])
    with ModelReading(path, with_vae, dtype, "cpu") as reading:
        model = load_stable_diffusion(str(path), vae=vae, dtype=dtype, reading=reading)
    assert_same_weights(model, load_stable_diffusion(str(path), vae=vae, dtype=dtype))
    assert model.prediction == "epsilon" and model.path == path


def test_reading_ends_when_nobody_wants_the_model(saved_models, monkeypatch):
    """As when the checks of a run find a wrong option meanwhile: most of the file stays unread."""
    threads, reads, go_on = torch.get_num_threads(), [], threading.Event()

    def read(self, name, *args):
        reads.append(name)
        go_on.wait(60)
        return torch.zeros(self.shapes[name])

    monkeypatch.setattr(loading.TensorFile, "read", read)
    with pytest.raises(KeyError), ModelReading(saved_models[False, "model.safetensors"], True, None, "cpu") as reading:
        threading.Timer(0.2, go_on.set).start()
        raise KeyError
    assert len(reads) <= 2 * loading.READERS < len(reading.file.shapes)
    assert reading.file._file.closed and torch.get_num_threads() == threads


@torch.no_grad()
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("kind", ["model.safetensors", "model.ckpt", "folder"])
def test_every_format_gives_the_same_ready_model(small_models, saved_models, v2, kind):
    path = saved_models[v2, kind]
    model = load_stable_diffusion(str(path), v2=v2)
    assert_same_weights(model, small_models[v2])
    assert (model.family.records.v2, model.prediction, model.name, model.path) == (v2, "epsilon", str(path), path)
    for part in PARTS:
        module, original = model.parts[part], small_models[v2].parts[part]
        assert not module.training
        assert not any(value.is_meta for value in [*module.parameters(), *module.buffers()])
        assert not any(parameter.requires_grad for parameter in module.parameters())
        theirs, ours = dict(original.config.to_dict() if part == "text_encoder" else original.config), module.config
        for key in ("attention_head_dim", "num_attention_heads", "hidden_act", "use_linear_projection", "scaling_factor"):
            if key in theirs:
                assert getattr(ours, key) == theirs[key]
    ids = tokenize(model.tokenizers, ["a cat"])["ids"]
    noisy, times = torch.ones(1, 4, 8, 8), torch.tensor([500])
    outputs = [
        m.denoiser(noisy, times, encoder_hidden_states=encode_text(m.text_encoders[0], ids)).sample
        for m in (model, small_models[v2])
    ]
    assert torch.equal(*outputs)


def test_weights_of_a_module_have_separate_memory(saved_models):
    """OpenCLIP's joined attention comes apart: training one third must not touch another, and safetensors must save them."""
    encoder = load_stable_diffusion(str(saved_models[True, "model.safetensors"]), v2=True).text_encoders[0]
    storages = [parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("model.safetensors", torch.float16), ("model.ckpt", torch.bfloat16), ("folder", torch.float16)]
)
def test_dtype(small_models, saved_models, kind, dtype):
    model = load_stable_diffusion(str(saved_models[False, kind]), dtype=dtype)
    for part in PARTS:
        original = small_models[False].parts[part].state_dict()
        for name, value in model.parts[part].state_dict().items():
            assert value.dtype == dtype and torch.equal(value, original[name].to(dtype))


def test_old_clip_names_and_position_ids(tmp_path, small_models, tensors):
    new, old = "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."
    tensors = {name.replace(new, old): value for name, value in tensors.items()}
    tensors[old + "embeddings.position_ids"] = torch.arange(77)[None]
    tensors["betas"] = torch.ones(1000)
    save_file(tensors, tmp_path / "old.safetensors")
    assert_same_weights(load_stable_diffusion(str(tmp_path / "old.safetensors")), small_models[False])


def test_sd2_uses_all_layers_of_the_file_but_the_last(saved_models):
    names = load_file(saved_models[True, "model.safetensors"])
    assert sum(name.endswith("attn.in_proj_weight") for name in names) == 3
    model = load_stable_diffusion(str(saved_models[True, "model.safetensors"]), v2=True)
    assert model.text_encoders[0].config.num_hidden_layers == 2 and model.text_encoders[0].config.hidden_act == "gelu"


@pytest.mark.parametrize("layout", ["fp16", "bin", "fp16.bin", "no text_model", "old vae names", "position_ids"])
def test_variants_of_folders(tmp_path, small_models, saved_models, layout):
    folder = tmp_path / "model"
    shutil.copytree(saved_models[False, "folder"], folder)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = folder / part / f"{stem}.safetensors"
        weights = load_file(path)
        path.unlink()
        if layout.endswith("bin"):
            stem = "pytorch_model" if part == "text_encoder" else stem
            torch.save(weights, folder / part / f"{stem}.{layout}")
            continue
        if layout == "no text_model":
            weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
        if layout == "position_ids" and part == "text_encoder":
            weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        if layout == "old vae names" and part == "vae":
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
        save_file(weights, folder / part / (f"{stem}.fp16.safetensors" if layout == "fp16" else f"{stem}.safetensors"))
    assert_same_weights(load_stable_diffusion(str(folder)), small_models[False])


@pytest.mark.parametrize("kind", ["model.safetensors", "folder"])
def test_wrong_generation_says_which_it_is(saved_models, kind):
    with pytest.raises(UserError, match="is an SD 2.x model; add --v2"):
        load_stable_diffusion(str(saved_models[True, kind]), v2=False)
    with pytest.raises(UserError, match="is an SD 1.x model; leave out --v2"):
        load_stable_diffusion(str(saved_models[False, kind]), v2=True)


@pytest.mark.parametrize(("channels", "kind"), [(9, "in-painting"), (8, "pix2pix"), (5, "depth")])
def test_other_inputs_are_refused_by_name(tmp_path, tensors, channels, kind):
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, channels, 3, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=kind):
        load_stable_diffusion(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "one part"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "a LoRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "a LoRA"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("emb_params", "textual inversion"),
        ("first_stage_model.encoder.conv_in.weight", "one part"),
        ("down_blocks.0.resnets.0.conv1.weight", "one part"),
        ("fc.weight", "no Stable Diffusion model"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, reason):
    save_file({name: torch.zeros(2)}, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=reason) as caught:
        load_stable_diffusion(str(tmp_path / "file.safetensors"))
    assert "file.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), "lacks 1 weight of the U-Net, the first is conv_out.bias"),
        (lambda t: t.update({"model.diffusion_model.foreign_emb.0.weight": torch.zeros(2)}), "foreign_emb"),
        (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(5)}), r"conv_out.bias .*has the shape \(5,\)"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("first_stage")], "holds no vae; give a VAE with --vae"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("cond_stage")], "holds no text encoder"),
        (lambda t: t.pop("model.diffusion_model.input_blocks.0.0.weight"), "incomplete"),
    ],
)
def test_incomplete_files(tmp_path, tensors, change, reason):
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=reason) as caught:
        load_stable_diffusion(str(tmp_path / "model.safetensors"))
    assert "model.safetensors" in str(caught.value)


def test_folders_that_are_no_models(tmp_path, saved_models):
    with pytest.raises(UserError, match="without model_index.json"):
        load_stable_diffusion(str(tmp_path))
    folder = tmp_path / "model"
    shutil.copytree(saved_models[False, "folder"], folder)
    (folder / "unet" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="no valid JSON"):
        load_stable_diffusion(str(folder))
    (folder / "unet" / "config.json").write_text(json.dumps({"block_out_channels": [32], "in_channels": 4}), encoding="utf-8")
    with pytest.raises(UserError, match="no unet can be built"):
        load_stable_diffusion(str(folder))
    (folder / "unet" / "config.json").write_text(json.dumps({"in_channels": 9}), encoding="utf-8")
    with pytest.raises(UserError, match="in-painting"):
        load_stable_diffusion(str(folder))
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match="cannot read"):
        load_stable_diffusion(str(folder))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}', encoding="utf-8")
    with pytest.raises(UserError, match="incomplete: StableDiffusionXLPipeline needs text_encoder_2"):
        load_stable_diffusion(str(folder))


def test_paths_that_do_not_exist_are_not_looked_up_on_the_hub(monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: pytest.fail("asked the hub"))
    for name in ("models/none.safetensors", "/no/such/folder", "none.ckpt", "a/b/c", "C:\\models\\x", "a--b/c"):
        with pytest.raises(UserError, match="there is no file or folder"):
            load_stable_diffusion(name)


@pytest.mark.parametrize(
    "form", ["model file", "model folder", "vae folder", "vae weights", "compvis", "compvis bare", "compvis .pt", "old ckpt"]
)
def test_vae_from_everything(tmp_path, saved_models, tensors, small_models, form):
    folder = saved_models[False, "folder"]
    prefix = "first_stage_model."
    vae = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    bare = {name[len(prefix) :]: value for name, value in vae.items()} | {"loss.logvar": torch.zeros(())}
    path = tmp_path / "vae.pt"
    if form == "compvis":
        save_file(vae, path := tmp_path / "vae.safetensors")
    elif form == "compvis bare":
        save_file(bare, path := tmp_path / "vae.safetensors")
    elif form == "compvis .pt":
        torch.save({"state_dict": bare}, path)
    elif form == "old ckpt":
        torch.save(bare, path, _use_new_zipfile_serialization=False)
    else:
        path = {
            "model file": saved_models[False, "model.safetensors"],
            "model folder": folder,
            "vae folder": folder / "vae",
            "vae weights": folder / "vae" / "diffusion_pytorch_model.safetensors",
        }[form]
    loaded = load_vae(str(path), torch.float32)
    assert weights_fingerprint(loaded) == weights_fingerprint(small_models[False].vae)
    images = torch.zeros(1, 3, 32, 32)
    assert loaded.encode(images).latent_dist.sample().shape == (1, 4, 4, 4)


def test_vae_option_replaces_the_vae_even_of_a_file_without_one(tmp_path, saved_models, tensors, small_models):
    stripped = {name: value for name, value in tensors.items() if not name.startswith("first_stage_model.")}
    save_file(stripped, tmp_path / "model.safetensors")
    other = str(saved_models[True, "folder"])
    model = load_stable_diffusion(str(tmp_path / "model.safetensors"), vae=other, dtype=torch.float32)
    assert weights_fingerprint(model.vae) == weights_fingerprint(small_models[True].vae)
    assert weights_of(model.text_encoders[0]).keys() == weights_of(small_models[False].text_encoders[0]).keys()


def test_files_that_hold_no_vae(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.safetensors", tmp_path):
        with pytest.raises(UserError, match="holds no VAE"):
            load_vae(str(path), torch.float32)


def test_scheduler_of_another_prediction_type_is_reported(saved_models, caplog):
    load_stable_diffusion(str(saved_models[True, "folder"]), v2=True, prediction="v")
    assert "--v_parameterization is probably wrong" in caplog.text
    assert loading.logger.name == "library.models.loading"
