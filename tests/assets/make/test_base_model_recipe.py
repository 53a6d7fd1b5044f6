"""base_model: from tars of images to a model, broken off and gone on with; and the parts that it is made of."""

from __future__ import annotations

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from assets.make import augment, autoencoder, base_model, diffusion, fetch, images, names, perceptual, training
from assets.make.perceptual import Perceptual
from library.errors import UserError
from library.models.family import LatentSpace
from library.models.loading import load_stable_diffusion
from tools.make_example_dataset import names_by_group

EMOJI = {"1f34c": "Banana", "1f511": "Key", "1f419": "Octopus", "1f680": "Rocket", "1f600": "Grinning face"}
NAMED = {"Animals & Nature": ("octopus",), "Food & Drink": ("banana",), "Objects": ("key",), "Travel & Places": ("rocket",)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """captions.tsv and a tar a style, with images of noise."""
    folder = tmp_path_factory.mktemp("emoji")
    groups = {name: group for group, members in NAMED.items() for name in members}
    lines = [f"{code}\t{name}\t{groups.get(name.lower(), 'Smileys')}\t{name}, food, :D, a b\n" for code, name in EMOJI.items()]
    (folder / "captions.tsv").write_text("".join(lines), encoding="utf-8")
    random = np.random.default_rng(0)
    for style in names.AUTOENCODER_STYLES:
        with tarfile.open(folder / f"{style}.tar", "w") as tar:
            for code in EMOJI:
                content = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(content, "WEBP")
                entry = tarfile.TarInfo(f"{style}/{code}.webp")
                entry.size = content.tell()
                content.seek(0)
                tar.addfile(entry, content)
    return folder


@pytest.fixture
def tiny(monkeypatch, vgg_weights):
    """Few names, narrow models, small batches, a small measure."""
    monkeypatch.setattr(perceptual, "installed_weights", lambda: vgg_weights)
    for module in (images, autoencoder):
        monkeypatch.setattr(module, "NAMES", NAMED)
    monkeypatch.setattr(autoencoder, "CHANNELS", (32, 32, 32, 32))
    monkeypatch.setattr(autoencoder, "BATCH", 2)
    monkeypatch.setattr(autoencoder, "HELD_OUT", 2)
    monkeypatch.setattr(autoencoder, "REPORT_EVERY", 1)
    monkeypatch.setattr(diffusion, "UNET_CHANNELS", (32, 32, 32, 32))
    monkeypatch.setattr(diffusion, "TEXT_LAYERS", 1)
    monkeypatch.setattr(diffusion, "BATCH", 4)
    monkeypatch.setattr(diffusion, "SHEET_NAMES", ("key",))
    monkeypatch.setattr(diffusion, "REPORT_EVERY", 1)
    monkeypatch.setattr(diffusion, "TEXT_ENCODER_STEPS", 2)


def run(monkeypatch, source, folder, *options):
    command = ["base_model.py", "--images", str(source), "--work", str(folder), "--output", str(folder / "base")]
    monkeypatch.setattr(sys, "argv", [*command, "--vae_steps", "3", "--unet_steps", "3", *options])
    return base_model.main()


def weights(folder):
    return {
        f"{part}/{name}": value
        for part in ("vae", "unet", "text_encoder")
        for path in (folder / "base" / part).glob("*.safetensors")
        for name, value in load_file(path).items()
    }


@pytest.mark.slow
def test_a_run_broken_off_in_each_training_ends_with_the_same_weights(tiny, source, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, source, tmp_path / "whole") == 0
    save = training.Checkpoint.save

    def save_and_break(self, step):
        save(self, step)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(training.Checkpoint, "save", save_and_break)
        for _ in range(2):  # in the VAE's training, in the U-Net's
            with pytest.raises(KeyboardInterrupt):
                run(broken, source, tmp_path / "broken")
    assert run(monkeypatch, source, tmp_path / "broken") == 0

    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert whole.keys() == resumed.keys() and len(whole) > 500
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    printed = capsys.readouterr().out
    assert "VAE step 3/3: held-out PSNR" in printed and "U-Net step 3/3" in printed and "validation" in printed
    check_model(tmp_path / "whole")


def check_model(folder):
    """It loads, in fp16 on disk; only tokens of the captions have embeddings; the sheet shows one name in three styles."""
    model = load_stable_diffusion(str(folder / "base"))
    table = weights(folder)["text_encoder/text_model.embeddings.token_embedding.weight"]
    assert table.dtype == torch.float16
    used = table.abs().sum(dim=1) > 0
    ids = model.tokenizers[0]("a twemoji emoji of a key, food").input_ids
    assert used[ids].all() and used.sum() < 30
    with Image.open(folder / "sheet-000003.png") as sheet:
        assert sheet.size == (64, 3 * 64)


def test_opponent_colours_separate_brightness_from_hues():
    grey, red, green = (
        torch.tensor(colour).view(1, 3, 1, 1) for colour in ((0.5, 0.5, 0.5), (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0))
    )
    assert autoencoder.opponent(grey).flatten()[1:].abs().max() < 0.01
    brightness, orange, greenness = autoencoder.opponent(red).flatten().tolist()
    assert brightness < 0 < orange and greenness < 0
    assert autoencoder.opponent(green).flatten()[2] > 5


def test_errors_of_hue_count_most_where_images_differ_least():
    grey = torch.zeros(1, 3, 16, 16)
    shifts = {
        "brighter": (0.1, 0.1, 0.1),
        "bluer": (-0.122, 0.0, 0.122),
        "greener": (-0.071, 0.141, -0.071),
    }  # equally long in RGB
    cost = {name: float(autoencoder.difference(grey + torch.tensor(by).view(3, 1, 1), grey)) for name, by in shifts.items()}
    assert cost["brighter"] < cost["bluer"] < cost["greener"]


def test_a_new_autoencoder_sees_all_opponent_colours_alike():
    """The first convolution answers to a unit of each alike; the last gives each in proportion to its deviation in images."""
    vae = autoencoder.new_autoencoder(seed=0)
    to_rgb = torch.tensor(autoencoder.OPPONENT_COLOURS).inverse()
    first, last = vae.encoder.conv_in.weight.detach(), vae.decoder.conv_out.weight.detach()
    seen = torch.einsum("oihw,ij->ojhw", first, to_rgb).square().mean(dim=(0, 2, 3)).sqrt()
    assert float(seen.max() / seen.min()) < 1.3
    drawn = autoencoder.opponent(last.transpose(0, 1).flatten(2)[..., None]).square().mean(dim=(0, 2, 3)).sqrt()
    assert float(drawn.max() / drawn.min()) < 1.3


def test_green_and_purple_kept_is_all_for_the_image_and_none_for_grey():
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert autoencoder.green_and_purple(images, images) == pytest.approx(1)
    assert autoencoder.green_and_purple(images.mean(dim=1, keepdim=True).expand_as(images), images) < 0.1


def test_the_perceptual_distance_joins_the_loss_late(tiny, vgg_weights):
    torch.manual_seed(0)
    vae, reader, measure = autoencoder.new_autoencoder(seed=0), torch.nn.Conv2d(4, 3, 1), Perceptual(vgg_weights)
    image = torch.rand(1, 3, 64, 64) * 2 - 1

    def loss(done, measure):
        torch.manual_seed(1)
        return float(autoencoder._loss(vae, reader, image, done, measure).detach())

    assert loss(0.59, None) == loss(0.59, measure)
    torch.manual_seed(1)
    drawn = autoencoder.softly_clipped(vae.decode(vae.encode(image).latent_dist.sample()).sample)
    assert loss(0.61, measure) - loss(0.59, measure) == pytest.approx(float(measure.distance(drawn, image).detach()), rel=1e-3)


def test_the_text_encoder_learns_to_distinguish_captions(tiny, source, tmp_path):
    named = images.unpack(source, tmp_path / "images").named
    made = diffusion.new_training(autoencoder.new_autoencoder(seed=0).eval().requires_grad_(False), named, seed=0)
    short, longer = diffusion.pretrain_text_encoder(made, steps=5), diffusion.pretrain_text_encoder(made, steps=60)
    assert longer < 0.8 * short


def test_missing_images_are_named(tmp_path):
    with pytest.raises(UserError, match="captions.tsv is missing; give --images"):
        images.unpack(tmp_path, tmp_path / "work")


def test_captions_are_the_prompt_and_plain_keywords(tiny, source, tmp_path):
    unpacked = images.unpack(source, tmp_path / "images")
    caption = (unpacked.named / "fluent3d" / "octopus.txt").read_text(encoding="utf-8")
    assert caption == "a 3d emoji of an octopus, food, a b\n"
    assert len(unpacked.files("notov1")) == len(EMOJI)


def test_no_name_is_listed_twice_and_line_art_stays_out():
    listed = [name for group in names.NAMES.values() for name in group]
    assert len(listed) == len(set(listed)) == 161
    assert not {"fluenthc", "fluentflat"} & {*names.AUTOENCODER_STYLES, *names.STYLES.values()}


def test_scaled_latents_have_deviation_one_and_decode_to_the_same_image():
    torch.manual_seed(0)
    vae = autoencoder.new_autoencoder(seed=0).eval()
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mode()).sample
        deviation = vae.encode(images).latent_dist.std
        autoencoder.scale_latents(vae, images)
        posterior = vae.encode(images).latent_dist
        after = vae.decode(posterior.mode()).sample
    scaled = posterior.mode() * LatentSpace().scale
    assert scaled.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert abs(float(scaled.std()) - 1) < 0.02
    assert torch.allclose(before, after, atol=1e-4)
    ratio = posterior.std / deviation  # the posterior's spread grows as the latents do
    assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-3)


def test_line_art_is_dark_lines_on_white():
    torch.manual_seed(1)
    square = torch.ones(1, 64, 64)
    square[:, 16:48, 16:48] = 0.3
    drawings = torch.stack([augment.line_art(square) for _ in range(20)])
    upright = drawings[drawings[:, 0, 0, 0] > 0.9]  # not inverted
    assert len(upright) > 10
    assert (upright[:, 0, 16, 20:44] < 0.5).all()  # the square's edge
    assert (upright[:, 0, :12] > 0.9).all()


def test_augmented_images_keep_shape_and_range():
    torch.manual_seed(2)
    changed = augment.augmented(torch.rand(64, 3, 32, 32))
    assert changed.shape == (64, 3, 32, 32) and changed.min() >= 0 and changed.max() <= 1
    grey = (changed - changed.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert 4 <= grey.sum() <= 24  # a quarter


@pytest.mark.parametrize(("snr", "weight"), [(0.01, 50.0), (0.25, 2.0), (1.0, 1.0), (4.0, 1.0), (50.0, 0.1)])
def test_loss_weights(snr, weight):
    assert float(diffusion.loss_weights(torch.tensor([snr]))) == pytest.approx(weight, rel=1e-4)


def test_learning_rate_rises_then_falls_to_two_per_cent():
    rates = [training.rate_at(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) > 0.95
    assert rates.index(max(rates)) < 120 and rates[-1] == pytest.approx(0.02, abs=1e-4)


def test_fetched_names_leave_out_flags_and_skin_tones(tmp_path):
    entries = {
        "\U0001f511": {"name": "key", "group": "Objects", "slug": "key"},
        "\u2600\ufe0f": {"name": "sun", "group": "Travel & Places", "slug": "sun"},
        "\U0001f44b\U0001f3fb": {"name": "hand", "group": "People & Body", "slug": "hand"},
        "\U0001f3c1": {"name": "chequered flag", "group": "Flags", "slug": "flag"},
    }
    (tmp_path / "dist").mkdir()
    (tmp_path / "data-by-emoji.json").write_text(json.dumps(entries), encoding="utf-8")
    (tmp_path / "dist" / "emoji-en-US.json").write_text(
        json.dumps({"\U0001f511": ["key", "front_door", "key"]}), encoding="utf-8"
    )
    found = fetch._emoji(tmp_path, tmp_path)
    assert list(found) == ["1f511", "2600"]
    assert found["1f511"]["keywords"] == "key, front door"


def test_names_of_the_example_dataset_are_still_found_in_such_a_folder(source):
    assert names_by_group(source)["Objects"] == {"key": "1f511"}
