"""library/models/sdxl.py: SDXL's text, sizes, files and names, against Diffusers and the ecosystem's list of LoRA keys."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.formats.blocks import SDXL_BLOCKS
from library.formats.tensor_file import TensorFile
from library.models import sdxl
from library.models.clip import tokenize
from library.models.family import Model
from library.models.loading import load_stable_diffusion, load_vae, read_header
from library.models.modules import evaluating, weights_of
from library.models.saving import save_stable_diffusion
from library.models.unet import unet_config
from library.testing import full_size_header, sdxl_configs, small_model, small_sdxl, small_stable_diffusion
from networks.lora import create_network

KEYS = Path(__file__).parents[2] / "data" / "lora-keys-sdxl.csv"
POOLED, PROJECTION = "conditioner.embedders.1.model.", "conditioner.embedders.1.model.text_projection"


@pytest.fixture(scope="module")
def model():
    """Tests must not change it."""
    return small_sdxl(seed=2)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("sdxl") / "model.safetensors"
    save_stable_diffusion(model, path)
    return path


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory):
    path = tmp_path_factory.mktemp("sdxl") / "folder"
    save_stable_diffusion(load_stable_diffusion(str(file)), path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    """Diffusers' own, of the folder that was written from a single file."""
    from diffusers import StableDiffusionXLPipeline

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe = StableDiffusionXLPipeline.from_pretrained(str(folder), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoded(model, texts, length=None, weighted=False, clip_skip=None):
    with torch.no_grad():
        return model.encode_text(tokenize(model.tokenizers, texts, length, weighted), clip_skip)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("text", ["a photo of a cat", "", "an owl, (at night)"])
def test_trap_1_12_text_vectors_equal_diffusers(file, pipeline, text):
    """From the single file, whose text_projection is transposed; padding 0 in the second encoder."""
    ours = encoded(load_stable_diffusion(str(file)), [text])
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours["context"], context, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["pooled"], pooled, rtol=1e-4, atol=1e-5)


def test_padding_of_the_second_encoder_is_0(model):
    tokens = tokenize(model.tokenizers, ["a cat"])
    assert tokens["ids"][0, 0, :5].tolist() == [49406, 320, 2368, 49407, 49407]
    assert tokens["ids_2"][0, 0, :5].tolist() == [49406, 320, 2368, 49407, 0]


def test_trap_14_long_text_has_152_or_227_positions_and_the_pooled_vector_of_its_first_chunk(model):
    long = ", ".join(["an old castle above the river at dawn"] * 20)
    one, two, three = (encoded(model, [long], length) for length in (None, 150, 225))
    assert [len(each["context"][0]) for each in (one, two, three)] == [77, 152, 227]
    assert torch.allclose(one["pooled"], three["pooled"], atol=1e-6)
    assert torch.allclose(one["context"][:, :76], three["context"][:, :76], atol=1e-5)


def test_trap_13_pooling_takes_the_first_end_token_and_not_the_largest_id():
    model = small_sdxl(seed=2)
    for encoder in model.text_encoders:
        words = encoder.get_input_embeddings()
        words.weight = torch.nn.Parameter(torch.cat([words.weight, torch.ones(1, 64)]))  # an added word: 49408
    plain = tokenize(model.tokenizers, ["a cat"])
    added = {name: ids.clone() for name, ids in plain.items()}
    for ids in added.values():
        ids[0, 0, 1] = 49408
    repeated = {name: ids.clone() for name, ids in added.items()}
    repeated["ids_2"][0, 0, 4:] = 49407  # all behind the end; a causal encoder pools the same
    with torch.no_grad():
        pooled = [model.encode_text(tokens)["pooled"] for tokens in (plain, added, repeated)]
        second = model.text_encoders[1]
        states = second.text_model(added["ids_2"][:, 0]).last_hidden_state
        at_the_end, at_the_word = (second.text_projection(states[:, position]) for position in (3, 1))
    assert torch.allclose(pooled[1], at_the_end, atol=1e-6) and not torch.allclose(pooled[1], at_the_word, atol=1e-2)
    assert torch.allclose(pooled[1], pooled[2], atol=1e-6) and not torch.allclose(pooled[0], pooled[1], atol=1e-2)


def test_weights_multiply_the_states_of_both_encoders_and_leave_the_pooled_vector(model):
    plain, weighted = encoded(model, ["a cat"], weighted=True), encoded(model, ["a (cat:1.5)"], weighted=True)
    assert torch.equal(weighted["pooled"], plain["pooled"])
    assert torch.allclose(weighted["context"][:, 2], plain["context"][:, 2] * 1.5, atol=1e-5)
    assert torch.equal(weighted["context"][:, 1], plain["context"][:, 1])


def test_trap_9_clip_skip_changes_nothing_and_says_so(model, caplog):
    assert torch.equal(encoded(model, ["a cat"], clip_skip=1)["context"], encoded(model, ["a cat"])["context"])
    assert model.family.text.clip_skip(2) is None and not caplog.text
    assert model.family.text.clip_skip(1) is None and "--clip_skip 1 has no effect" in caplog.text


def test_trap_38_gradients_reach_both_encoders_but_not_layers_behind_the_one_that_is_read():
    model = small_sdxl(seed=3)
    for encoder in model.text_encoders:
        encoder.requires_grad_(True)
    tokens = tokenize(model.tokenizers, ["a cat"])
    conditioning = model.encode_text(tokens)
    (conditioning["context"].square().sum() + conditioning["pooled"].square().sum()).backward()
    first, second = ({name: p.grad for name, p in encoder.named_parameters()} for encoder in model.text_encoders)
    dead = {name for name, grad in first.items() if grad is None or not grad.any()}
    assert any("layers.2.mlp" in name for name in dead) and not any("layers.1.mlp" in name for name in dead)
    assert not any("layers.2.mlp" in name for name, grad in second.items() if grad is None or not grad.any())


def test_trap_10_the_layer_before_the_last_is_what_diffusers_reads_without_clip_skip(model, pipeline):
    """Diffusers' clip_skip counts from there, and the pooled vector is that of the last layer whatever is skipped."""
    with torch.no_grad():
        plain, skipped = (
            pipeline.encode_prompt("a cat", do_classifier_free_guidance=False, clip_skip=skip)[::2] for skip in (None, 1)
        )
    assert not torch.allclose(plain[0], skipped[0], atol=1e-3) and torch.equal(plain[1], skipped[1])
    for clip_skip in (None, 1, 2):
        ours = encoded(model, ["a cat"], clip_skip=clip_skip)
        torch.testing.assert_close(ours["context"], plain[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours["pooled"], plain[1], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- U-Net


def test_the_unet_reads_text_pooled_text_and_sizes_as_diffusers_does(model, pipeline):
    noisy, t = torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 900])
    sizes = torch.tensor([[768, 512, 0, 64, 128, 64], [2000, 1500, 10, 0, 128, 64]])
    text = encoded(model, ["a cat", "a dog"])
    with torch.no_grad():
        ours = model.predict(noisy, t, text, sizes)
        added = {"text_embeds": text["pooled"], "time_ids": sizes}
        theirs = pipeline.unet(noisy, t, encoder_hidden_states=text["context"], added_cond_kwargs=added).sample
        others = [model.predict(noisy, t, text, sizes.index_fill(1, torch.tensor([i]), 300)) for i in range(6)]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert all((other - ours).abs().max() > 1e-4 for other in others)


def test_parts_of_a_row_of_text_are_moved_stacked_and_sliced_together(model):
    text = encoded(model, ["a cat", "a dog"])
    rows = list(text.split())
    again = type(text).cat(rows)
    assert all(torch.equal(again[name], text[name]) for name in ("context", "pooled"))
    shapes = model.family.text.shapes(model, 77)
    assert {name: tuple(value.shape[1:]) for name, value in text.tensors.items()} == shapes


# ---------------------------------------------------------------- files


def test_from_file_to_folder_and_back_bit_for_bit(file, folder, tmp_path):
    save_stable_diffusion(load_stable_diffusion(str(folder)), tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == file.read_bytes()
    tensors = load_file(file)
    assert tensors["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (192, 64)
    assert "model.diffusion_model.label_emb.0.0.weight" in tensors
    assert POOLED + "logit_scale" in tensors


def test_trap_1_2_the_projection_is_transposed_unless_its_key_is_that_of_a_linear_layer(file, model, tmp_path):
    tensors = load_file(file)
    weight = model.text_encoders[1].text_projection.weight
    assert torch.equal(tensors[PROJECTION], weight.T) and not torch.equal(tensors[PROJECTION], weight)
    tensors[PROJECTION + ".weight"] = tensors.pop(PROJECTION).T.contiguous()
    save_file(tensors, tmp_path / "variant.safetensors")
    variant = load_stable_diffusion(str(tmp_path / "variant.safetensors"))
    assert torch.equal(variant.text_encoders[1].text_projection.weight, weight)


def test_trap_51_what_a_file_holds_beside_the_parts_comes_back(file, tmp_path):
    extra = {
        POOLED + "logit_scale": torch.tensor(4.6055),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.0.logit_scale": torch.tensor(4.6),
        "v_pred": torch.empty(0),
        "ztsnr": torch.empty(0),
        "denoiser.sigmas": torch.ones(1000),
    }
    save_file(tensors := load_file(file) | extra, tmp_path / "marked.safetensors")
    loaded = load_stable_diffusion(str(tmp_path / "marked.safetensors"))
    assert (loaded.prediction, loaded.zero_terminal_snr) == ("v", True)
    save_stable_diffusion(loaded, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


def test_a_ckpt_and_half_precision(model, file, tmp_path):
    """Both ways with the marks of the prediction, and all weights bit for bit."""
    marked = {name: value.half() for name, value in load_file(file).items()} | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    save_file(marked, tmp_path / "marked.safetensors")
    first = load_stable_diffusion(str(tmp_path / "marked.safetensors"), dtype=torch.float16)
    save_stable_diffusion(first, tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    loaded = load_stable_diffusion(str(tmp_path / "model.ckpt"), dtype=torch.float16)
    assert loaded.family is sdxl.FAMILY and loaded.denoiser.dtype == torch.float16
    assert (loaded.prediction, loaded.zero_terminal_snr) == ("v", True)
    save_stable_diffusion(loaded, tmp_path / "back.safetensors")
    for again in (content, load_file(tmp_path / "back.safetensors")):
        assert again.keys() == marked.keys() and all(torch.equal(again[name], value) for name, value in marked.items())


def test_the_refiners_folder_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "refiner")
    shutil.rmtree(tmp_path / "refiner" / "text_encoder")
    with pytest.raises(UserError, match="is the refiner of SDXL"):
        load_stable_diffusion(str(tmp_path / "refiner"))


def test_trap_59_weights_are_read_one_by_one_into_the_dtype_they_are_used_in(model, tmp_path, monkeypatch):
    """So a model needs the memory of its weights, and no copy of the file beside them."""
    save_stable_diffusion(model, tmp_path / "half.safetensors", dtype=torch.float16)
    raw, most = [], 0
    read_bytes = TensorFile._read_bytes

    def watched(self, begin, count):
        nonlocal most
        space = read_bytes(self, begin, count)
        raw.append(weakref.ref(space))
        most = max(most, sum(each() is not None for each in raw))
        return space

    monkeypatch.setattr(TensorFile, "_read_bytes", watched)
    loaded = load_stable_diffusion(str(tmp_path / "half.safetensors"), dtype=torch.bfloat16)
    weights = [weight for part in loaded.parts.values() for weight in part.parameters()]
    assert len(raw) > 500 and most <= 2
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)


def test_another_vae_has_the_scale_of_the_family_or_that_which_it_states(file, tmp_path, caplog):
    assert load_vae(str(file), part=sdxl.VAE).config.scaling_factor == 0.13025
    vae = small_stable_diffusion(seed=9)
    save_stable_diffusion(vae, tmp_path / "sd1.safetensors")
    assert load_stable_diffusion(str(file), vae=str(tmp_path / "sd1.safetensors")).latents.scale == 0.13025
    assert not caplog.text
    vae.vae.save_pretrained(tmp_path / "vae")
    assert load_stable_diffusion(str(file), vae=str(tmp_path / "vae")).latents.scale == 0.18215
    assert f"{tmp_path / 'vae'} says that its latents are scaled by 0.18215, SDXL by 0.13025" in caplog.text


# ---------------------------------------------------------------- what the model predicts


@pytest.mark.parametrize(
    "marks, metadata, expected",
    [
        ({}, {}, ("epsilon", False)),
        ({"v_pred"}, {}, ("v", False)),
        ({"v_pred", "ztsnr"}, {"modelspec.prediction_type": "epsilon"}, ("v", True)),
        ({}, {"modelspec.prediction_type": "v"}, ("v", False)),
        ({}, {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
    ],
)
def test_trap_3_a_file_says_what_it_predicts(file, tmp_path, marks, metadata, expected):
    path = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: torch.empty(0) for name in marks}, path, metadata=metadata)
    loaded = load_stable_diffusion(str(path))
    assert (loaded.prediction, loaded.zero_terminal_snr) == expected
    stated = read_header(str(path)).stated
    assert (stated.prediction or "epsilon", stated.zero_terminal_snr) == expected


def test_trap_3_a_folder_says_it_by_its_scheduler_and_what_is_asked_for_wins(file, tmp_path, caplog):
    model = load_stable_diffusion(str(file), prediction="v")
    model.zero_terminal_snr = True
    save_stable_diffusion(model, tmp_path / "folder")
    again = load_stable_diffusion(str(tmp_path / "folder"))
    assert (again.prediction, again.zero_terminal_snr, again.process().alphas()[-1].item()) == ("v", True, 0.0)
    save_stable_diffusion(again, tmp_path / "again.safetensors")
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "again.safetensors").keys()
    asked = load_stable_diffusion(str(tmp_path / "folder"), prediction="epsilon")
    assert (asked.prediction, asked.zero_terminal_snr) == ("epsilon", False)
    assert "is probably wrong" in caplog.text


# ---------------------------------------------------------------- relatives


def test_trap_6_7_relatives_are_refused_by_name(file, folder, tmp_path):
    tensors = load_file(file)
    unet = "model.diffusion_model."
    refiner = {
        name.replace("embedders.1.", "embedders.0."): value for name, value in tensors.items() if "embedders.0." not in name
    }
    changed = {
        "the refiner of SDXL": refiner,
        "CosXL": tensors | {"edm_vpred.sigma_max": torch.ones(())},
        "Playground v2.5": tensors | {"edm_mean": torch.ones(4), "edm_std": torch.ones(4)},
        "scaled 8 bits of ComfyUI": tensors | {unet + "out.2.scale_weight": torch.ones(())},
        "4 bits of bitsandbytes": tensors | {unet + "out.2.weight.quant_state.bitsandbytes__nf4": torch.ones(4)},
        "Kolors": tensors | {unet + "encoder_hid_proj.weight": torch.ones(4)},
        "in-painting": tensors | {unet + "input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)},
        "instruct-pix2pix": tensors | {unet + "input_blocks.0.0.weight": torch.ones(32, 8, 3, 3)},
    }
    for name, content in changed.items():
        save_file(content, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=name):
            load_stable_diffusion(str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("kept", ["model.diffusion_model.", ("model.diffusion_model.", "conditioner.embedders.0.")])
def test_trap_8_a_u_net_without_text_encoders_is_not_taken_for_sd_1(file, tmp_path, kept):
    save_file({name: value for name, value in load_file(file).items() if name.startswith(kept)}, tmp_path / "part.safetensors")
    for read in (read_header, load_stable_diffusion):
        with pytest.raises(UserError, match="part.safetensors holds no text encoder, or not all that it needs; fetch the whole"):
            read(str(tmp_path / "part.safetensors"))


@pytest.mark.parametrize(
    "change, message",
    [
        (("model_index.json", {"_class_name": "KolorsPipeline"}), "Kolors"),
        (("vae/config.json", {"latents_mean": [0.1, 0.2, 0.3, 0.4]}), "Playground"),
        (("unet/config.json", {"in_channels": 9}), "in-painting"),
        (("unet/config.json", {"in_channels": 8}), "instruct-pix2pix"),
        (("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}), "CosXL"),
    ],
)
def test_folders_of_relatives_are_refused_by_name(model, tmp_path, change, message):
    save_stable_diffusion(model, tmp_path / "folder")
    path = tmp_path / "folder" / change[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | change[1]))
    with pytest.raises(UserError, match=message):
        load_stable_diffusion(str(tmp_path / "folder"))


DISTILLED = {
    "SSD-1B": {
        "depths": {
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
        "middle": "UNetMidBlock2D",
    },
    "Vega": {
        "depths": {"transformer_layers_per_block": [1, 1, 2], "reverse_transformer_layers_per_block": [[2, 2, 2], 1, 1]},
        "middle": "UNetMidBlock2D",
    },
    "KOALA-700M": {
        "depths": {"transformer_layers_per_block": [1, 2, 5], "reverse_transformer_layers_per_block": [5, 2, 1]},
        "middle": None,
        "layers": 1,
    },
    "KOALA-1B": {"depths": {"transformer_layers_per_block": [1, 2, 6]}, "layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", DISTILLED)
def test_trap_6_distilled_relatives_load_with_the_depths_of_their_tensors(tmp_path, model, name):
    configs = {part: dict(module.config.to_dict() if "text" in part else module.config) for part, module in model.parts.items()}
    configs["unet"] = unet_config(
        (32, 32, 32), context_width=128, heads=None, linear_projection=True, attention=(False, True, True),
        vector_width=64 + 6 * 256, **DISTILLED[name],
    )  # fmt: skip
    small = small_model(sdxl.FAMILY, configs)
    save_stable_diffusion(small, tmp_path / "model.safetensors")
    loaded = load_stable_diffusion(str(tmp_path / "model.safetensors"))
    assert weights_of(loaded.denoiser).keys() == weights_of(small.denoiser).keys()
    noisy, t, sizes = torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 6, dtype=torch.int64)
    with torch.no_grad():
        outputs = [each.predict(noisy, t, encoded(each, ["a cat"]), sizes) for each in (small, loaded)]
    assert torch.equal(*outputs)
    names = create_network(1.0, 4, 1, None, *loaded.for_networks()).state_dict()
    assert all(SDXL_BLOCKS.block_index(name) is not None for name in names if name.startswith("lora_unet"))


# ---------------------------------------------------------------- names in LoRA files, at full size


@cache
def full_size() -> Model:
    """On the meta device."""
    configs = sdxl_configs()
    parts = {part.name: part.build(configs[part.name]) for part in sdxl.FAMILY.parts}
    return Model(sdxl.FAMILY, parts, [], "epsilon", "full size")


def rows() -> list[dict[str, str]]:
    with open(KEYS, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("column, network_args, unet_modules", [("in_default", {}, 722), ("in_conv_dim", {"conv_dim": "4"}, 788)])
def test_trap_18_every_lora_key_has_the_listed_name_and_shape(column, network_args, unet_modules):
    network = create_network(1.0, 4, 1, None, *full_size().for_networks(), **network_args)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    expected = {}
    for row in rows():
        if row[column] == "yes":
            kernel = (int(row["kernel"][0]),) * 2 if row["layer_type"] == "Conv2d" else ()
            expected[row["name"] + ".alpha"] = ()
            expected[row["name"] + ".lora_down.weight"] = (4, int(row["in"]), *kernel)
            expected[row["name"] + ".lora_up.weight"] = (int(row["out"]), 4, *(1 for _ in kernel))
    assert shapes == expected
    names = {name.split(".")[0] for name in shapes}
    counts = {prefix: sum(name.startswith(prefix) for name in names) for prefix in ("lora_unet", "lora_te1", "lora_te2")}
    assert counts == {"lora_unet": unet_modules, "lora_te1": 72, "lora_te2": 192}


def test_every_lora_key_is_in_the_listed_block():
    assert len(rows()) == 1058
    for row in rows():
        index = SDXL_BLOCKS.block_index(row["name"])
        assert str("te" if index is None else index) == row["block_index"], row["name"]


def test_trap_11_the_first_encoder_is_the_smaller_one_and_all_have_the_published_numbers():
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in full_size().parts.items()}
    assert counts == {
        "unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
    }  # fmt: skip
    assert full_size_header("sdxl").shapes["text_encoder_2"]["text_projection.weight"] == (1280, 1280)


def test_modes_of_both_encoders_come_back(model):
    with evaluating(*model.parts.values()):
        assert not any(encoder.training for encoder in model.text_encoders)
