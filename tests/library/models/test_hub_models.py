"""Models of the hub, without network: one question, one line of error, and what was fetched before is used."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.models.loading import load_stable_diffusion, load_vae, read_header
from library.models.modules import weights_fingerprint
from library.models.saving import save_stable_diffusion
from library.testing import small_sdxl

COMMIT = "0123456789" * 4


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def unreachable(monkeypatch) -> list[str]:
    """The hub does not answer. Gives the names that it was asked for."""
    asked = []

    def fail(api, name, *, timeout):
        asked.append(name)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nothing else may try either
    return asked


def fetched_before(cache: Path, name: str, folder: Path) -> None:
    """Put a folder into the hub's cache as if it had been downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")


@pytest.mark.parametrize("load", [load_stable_diffusion, load_vae])
def test_without_network_the_hub_is_asked_once_and_the_error_is_one_line(cache, unreachable, monkeypatch, load, caplog, capfd):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits to try again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"neither a file nor a folder here.*hub \(no route\); give a path") as caught:
            load("somebody/some-model")
    assert "\n" not in str(caught.value) and unreachable == ["somebody/some-model"]
    assert not caplog.text and capfd.readouterr() == ("", "")


def test_hf_hub_offline_is_respected(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="offline mode is enabled"):
        load_vae("somebody/some-vae")


def test_without_network_a_model_fetched_before_is_used(cache, unreachable, saved_models, small_models, caplog, capfd):
    fetched_before(cache, "somebody/some-model", saved_models[False, "folder"])
    model = load_stable_diffusion("somebody/some-model")
    assert model.path is None and model.name == "somebody/some-model"
    for part in ("text_encoder", "vae", "unet"):
        theirs = small_models[False].parts[part].state_dict()
        assert all(torch.equal(theirs[name], value) for name, value in model.parts[part].state_dict().items())
    assert not caplog.text and "Hub" not in "".join(capfd.readouterr())


def test_sdxl_and_the_vae_for_half_precision_by_their_names(cache, unreachable, tmp_path):
    model = small_sdxl(seed=2)
    save_stable_diffusion(model, tmp_path / "model")
    fetched_before(cache, "somebody/some-xl", tmp_path / "model")
    other = small_sdxl(seed=5).vae
    other.register_to_config(force_upcast=False)  # as madebyollin/sdxl-vae-fp16-fix has it
    other.save_pretrained(tmp_path / "vae")
    fetched_before(cache, "somebody/some-vae", tmp_path / "vae")
    assert read_header("somebody/some-xl").family is model.family
    loaded = load_stable_diffusion("somebody/some-xl", vae="somebody/some-vae")
    assert loaded.family is model.family and loaded.latents.scale == 0.13025
    assert weights_fingerprint(loaded.vae) == weights_fingerprint(other) != weights_fingerprint(model.vae)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        assert weights_fingerprint(loaded.parts[name]) == weights_fingerprint(model.parts[name])


@pytest.mark.parametrize("inside", ["", "vae"])
def test_without_network_a_vae_fetched_before_is_used(cache, unreachable, saved_models, small_models, caplog, inside):
    folder = saved_models[False, "folder"]
    fetched_before(cache, "somebody/some-vae", folder if inside else folder / "vae")
    vae = load_vae("somebody/some-vae")
    assert weights_fingerprint(vae) == weights_fingerprint(small_models[False].vae)
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters()) and not caplog.text


def test_with_network_the_hub_is_used_and_its_libraries_stay_quiet(cache, monkeypatch, saved_models, small_models, caplog):
    def download(name, *, local_files_only, **options):
        assert not local_files_only
        logging.getLogger("diffusers").warning("a remark")
        warnings.warn("another", UserWarning, stacklevel=1)
        return str(saved_models[False, "folder"])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, name, timeout: None)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    level = logging.getLogger("diffusers").level
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_stable_diffusion("somebody/some-model")
    assert weights_fingerprint(model.vae) == weights_fingerprint(small_models[False].vae)
    assert not caplog.text and logging.getLogger("diffusers").level == level


def test_a_download_that_breaks_off_is_one_line(cache, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("reset by peer\nat byte 5")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, name, timeout: None)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", fail)
    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", fail)
    for load in (load_stable_diffusion, load_vae):
        with pytest.raises(UserError, match=r"hub \(reset by peer\); give a path"):
            load("somebody/some-model")
