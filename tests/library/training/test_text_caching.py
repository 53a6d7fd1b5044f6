"""--cache_text_encoder_outputs through whole runs: the same bits as without, never stale, refused where it cannot be right."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import Recorder, image_folder

from library.data.text_cache import FOLDER
from library.errors import UserError
from library.models.saving import save_stable_diffusion
from library.testing import small_sdxl, small_stable_diffusion

CACHED, ON_DISK = "--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"


MODELS = {
    "sd1": partial(small_stable_diffusion, unet_channels=(32, 64)),
    "sdxl": partial(small_sdxl, unet_channels=(32, 32, 32), depths=(1, 1, 1)),
}


@pytest.fixture(scope="module", params=MODELS)
def base_model(request, tmp_path_factory) -> Path:
    """Of each family in turn."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_stable_diffusion(MODELS[request.param](vae_channels=(32, 32, 32, 32)), path)
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    """Of this test alone, since files are written beside them."""
    return image_folder(tmp_path / "images", 3)


@pytest.fixture
def train(run):
    def start(*words):
        recorder = Recorder()
        done = run("--network_train_unet_only", "--max_train_steps=3", "--network_dim=1", *words, recorder)
        return done, recorder.runs[0]

    return start


def same(one, other) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.option("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")
def test_a_cached_run_trains_the_same_bits_as_one_that_encodes_at_each_step(train, images):
    # The whole caption is one piece, so shuffling keeps it; but it keeps captions from being cached.
    words = ["--caption_prefix=photo,", "--caption_suffix=end"]
    plain, uncached = train("--shuffle_caption", "--caption_separator=;", *words)
    kept, in_memory = train(CACHED, *words)
    written, on_disk = train(ON_DISK, *words)
    again, read = train(ON_DISK, *words, "--max_data_loader_n_workers=1")
    assert uncached.data.train.texts is None and uncached.losses.values == in_memory.losses.values == on_disk.losses.values
    assert same(plain, kept) and same(plain, written) and same(plain, again)
    assert len(list((images / FOLDER).glob("*.safetensors"))) == 3
    for made in (in_memory, on_disk):
        assert all(next(encoder.parameters()).is_meta for encoder in made.model.text_encoders)  # nothing needs them any more


def test_arithmetic_in_16_bits_is_that_of_a_step(train):
    words = ["--mixed_precision=bf16", "--max_train_steps=1"]
    (plain, _), (kept, _) = train("--shuffle_caption", "--caption_separator=;", *words), train(CACHED, *words)
    torch.testing.assert_close(kept.tensors(), plain.tensors(), rtol=1e-2, atol=1e-6)


def test_trap_22_changed_captions_and_settings_are_encoded_anew(train, images):
    one_step = "--max_train_steps=1"
    train(ON_DISK, one_step)
    (images / "0.txt").write_text("a grey dog\nnot this line", encoding="utf-8")
    for words in ([], ["--max_token_length=150"], ["--weighted_captions"]):
        assert same(train(ON_DISK, *words, one_step)[0], train(CACHED, *words, one_step)[0])
    assert len(list((images / FOLDER).glob("*.safetensors"))) == 3 + 1 + 3 + 3


def test_resumed_with_files_or_in_memory_it_ends_in_the_same_bytes(train):
    whole, _ = train(ON_DISK, "--save_every_n_steps=2", "--save_state")
    for cache in (ON_DISK, CACHED):
        assert same(whole, train(cache, f"--resume={whole.folder / 'mine-step00000002-state'}")[0])


def test_previews_still_draw(train, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --s 1 --d 1\n", encoding="utf-8")
    done, _ = train(ON_DISK, f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=3")
    (image,) = (done.folder / "sample").glob("*.png")
    assert Image.open(image).size == (64, 64)


def test_held_out_images_are_cached_too(train):
    _, made = train(CACHED, "--validation_split=0.4")
    assert made.data.held_out.texts is made.data.train.texts is not None and made.validator.record.history


def test_trap_19_20_what_cannot_be_cached_is_refused_with_the_cure(run, images):
    with pytest.raises(UserError) as raised:
        run(CACHED, "--shuffle_caption")
    (training, varying) = raised.value.problems
    assert training.endswith("add --network_train_unet_only, or take out --cache_text_encoder_outputs")
    assert f"shuffle_caption of the subset {images}" in varying and "take out shuffle_caption" in varying
    run(CACHED, "--text_encoder_lr=0", "--caption_dropout_rate=0.5", "--max_train_steps=1", "--network_dim=1")
