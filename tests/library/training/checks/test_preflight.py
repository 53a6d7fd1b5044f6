from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingDataset
from library.entry import run_entry
from library.errors import UserError
from library.files import legacy_hash_of_file
from library.testing import full_size_header
from library.training.checks import disk_space, preflight
from library.training.checks.contradictions import contradictions
from library.training.checks.estimates import estimated_bytes, file_sizes, largest_batch
from library.training.options import parse_options
from library.training.plan import Plan


def options(*words: str, folder: Path = Path()):
    needed = ["--pretrained_model_name_or_path=some/model", f"--train_data_dir={folder}", "--output_dir", str(folder / "out"),
              "--network_module=networks.lora", "--resolution=64", "--learning_rate=1e-4"]  # fmt: skip
    return parse_options([*needed, *words])


usage = namedtuple("usage", "total used free")


@pytest.fixture(autouse=True)
def full_size(monkeypatch):
    """The model that is named is a full-size SD 1.5, without a file or the hub."""
    read = preflight.read_header
    monkeypatch.setattr(preflight, "read_header", lambda name, v2: read(name, v2) if Path(name).exists() else full_size_header())


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    return tmp_path


CPU = preflight.torch.device("cpu")


def problems(chosen) -> list[str]:
    with pytest.raises(UserError) as error:
        preflight.preflight(chosen, CPU, 1)
    return error.value.problems


def test_everything_that_is_wrong_is_reported_at_once_with_its_cure(folder):
    (folder / "file").write_text("x", encoding="utf-8")
    found = problems(options(
        "--pretrained_model_name_or_path=gone.safetensors", "--vae=gone.pt", "--train_data_dir=gone", "--reg_data_dir=gone2",
        "--network_weights=gone.pt", "--base_weights=gone2.pt", "--network_args", "conv_dm=4", "--optimizer_type=AdamV",
        "--sample_prompts=gone.txt", "--sample_at_first", "--metadata_thumbnail=gone.png", "--resume=gone-state",
        f"--output_dir={folder / 'file' / 'out'}", f"--logging_dir={folder / 'file' / 'logs'}", "--mixed_precision=fp16",
        "--skip_until_initial_step", "--early_stopping_patience=1", "--full_bf16", "--torch_compile", "--dynamo_backend=eagr",
    ))  # fmt: skip
    starts = [
        "--full_bf16 needs", "--mixed_precision fp16 needs a GPU",
        "--pretrained_model_name_or_path: there is no file", "--vae: there is no file", "--output_dir",
        "--network_weights gone.pt", "--base_weights gone2.pt",
        "--network_module networks.lora: unknown network_args key 'conv_dm'", "--optimizer_type AdamV", "--logging_dir",
        "--sample_prompts gone.txt", "--metadata_thumbnail gone.png", "--dynamo_backend eagr",
        "--train_data_dir=gone: no such folder", "--reg_data_dir=gone2: no such folder", "--resume gone-state",
    ]  # fmt: skip
    assert len(found) == len(starts), found
    for problem, start in zip(found, starts, strict=True):
        assert problem.startswith(start) and ("; " in problem or "did you mean" in problem or "needs" in problem), problem


def test_what_the_images_bring_to_light_is_reported_with_the_others(folder, monkeypatch):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage(0, 0, 0))
    (folder / "broken.png").write_bytes(b"no image")
    found = problems(options("--lr_scheduler=cosine", "--vae=gone.pt", folder=folder))
    assert [part in text for part, text in zip(("--vae", "broken.png"), found, strict=True)] == [True, True], found
    (folder / "broken.png").unlink()
    words = [
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=5",
        "--max_train_steps=4",
        "--early_stopping_patience=1",
        "--initial_step=9",
    ]
    found = problems(options("--vae=gone.pt", *words, folder=folder))
    parts = (
        "--vae",
        "--lr_warmup_steps is 5",
        "--early_stopping_patience needs",
        " free and the run writes",
        "9 steps done and 4",
    )
    assert [part in text for part, text in zip(parts, found, strict=True)] == [True] * 5, found


def test_a_file_that_is_no_model_is_reported_with_the_rest(folder):
    page = folder / "page.safetensors"
    page.write_text("<!DOCTYPE html><html>not found</html>", encoding="utf-8")
    found = problems(options(f"--pretrained_model_name_or_path={page}", "--vae=gone.pt", folder=folder))
    assert len(found) == 2 and "is a web page" in found[0]  # the model first: what it says decides about options


def test_a_wrong_schedule_is_reported_beside_missing_images(folder):
    found = problems(options("--train_data_dir=gone", "--lr_scheduler=cosin", folder=folder))
    assert len(found) == 2 and "did you mean 'cosine'" in found[0]


def test_missing_masks_are_reported_with_the_rest(folder):
    found = problems(options("--masked_loss", "--conditioning_data_dir=gone", "--vae=gone.pt", folder=folder))
    assert len(found) == 2 and found[1].startswith("--conditioning_data_dir=gone: there is no folder gone")


def test_each_problem_has_a_line_and_the_exit_code_is_2(folder, capsys):
    chosen = options("--vae=gone.pt", "--network_weights=gone.pt", folder=folder)
    with pytest.raises(SystemExit) as end:
        run_entry(lambda: preflight.preflight(chosen, CPU, 1))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 2 and all(line.startswith("error: --") for line in lines)


CONTRADICTIONS = {
    ("--use_8bit_adam", "--optimizer_type=Lion"): ["--use_8bit_adam", "--optimizer_type"],
    ("--sample_every_n_steps=5",): ["--sample_every_n_steps", "--sample_prompts"],
    ("--dim_from_weights",): ["--network_weights"],
    ("--log_with=all",): ["--log_with all needs --logging_dir"],
    ("--log_with=tensorboard",): ["--log_with tensorboard needs --logging_dir"],
}


@pytest.mark.option("sample_every_n_steps")
@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_options_that_contradict_each_other_are_named(words, folder):
    found = contradictions(options(*words, folder=folder))
    assert len(found) == 1 and all(part in found[0] for part in CONTRADICTIONS[words])


def test_contradictions_are_reported_together_and_with_the_rest(folder):
    found = problems(options("--dim_from_weights", "--sample_at_first", "--log_with=tensorboard", "--vae=gone.pt", folder=folder))
    assert len(found) == 4


def test_all_that_is_missing_is_reported_at_once():
    found = problems(parse_options([]))
    starts = (
        "--pretrained_model_name_or_path is missing",
        "--network_module",
        "--output_dir",
        "no images: give --dataset_config",
    )
    assert [text.startswith(start) for text, start in zip(found, starts, strict=True)] == [True] * 4


def test_nothing_wrong_passes(folder):
    ready = preflight.preflight(options("--max_train_steps=3", folder=folder), CPU, 1)
    assert len(ready.dataset.table) == 1 and ready.plan.max_steps == 3 and ready.start.step == 0


@pytest.mark.parametrize(
    "name, is_path",
    [
        ("runwayml/stable-diffusion-v1-5", False), ("some-model", False), ("./model", True), ("../model", True),
        ("~/model", True), ("/models/mine", True), ("C:/models/mine", True), ("models\\mine", True), ("a/b/c", True),
        ("mine.safetensors", True), ("there/model", True),
    ],
)  # fmt: skip
def test_what_looks_like_a_path_is_no_name_of_the_hub(name, is_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert preflight.looks_like_path(name) is is_path
    missing = list(preflight.missing_models(options(f"--pretrained_model_name_or_path={name}", f"--vae={name}").model))
    assert len(missing) == (2 if is_path else 0)


def dataset(folder: Path, **more) -> TrainingDataset:
    return TrainingDataset(
        [DatasetConfig(resolution=(64, 64), subsets=(SubsetConfig(image_dir=folder, flip_aug=True),), **more)], seed=1
    )


def space(chosen, folder: Path) -> float:
    """Bytes that are planned for the output folder, in files of the network."""
    return needed(chosen, dataset(folder))[folder / "out"] / file_sizes(chosen, full_size_header()).network


def needed(chosen, images: TrainingDataset) -> dict[Path, int]:
    """Bytes by folder."""
    return disk_space.space_needed(chosen, Plan.of(chosen.training, 1), images, full_size_header())


def test_a_disk_that_is_too_small_is_reported_before_the_model_loads(folder, monkeypatch):
    words = ["--network_dim=128", "--max_train_epochs=10", "--save_every_n_epochs=1", "--flip_aug"]
    chosen = options(*words, "--cache_latents_to_disk", folder=folder)
    size = file_sizes(chosen, full_size_header()).network
    assert space(chosen, folder) == 10 and 280e6 < size < 320e6
    assert needed(chosen, dataset(folder))[folder] == 2 * 8 * 8 * 4 * 4  # two latents of 4 x 8 x 8 float32
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage(0, 0, 10 * size))
    found = problems(chosen)
    assert len(found) == 1 and "GiB free and the run writes about" in found[0] and "--save_last_n_epochs" in found[0]
    preflight.preflight(options(*words, "--save_last_n_epochs=2", folder=folder), CPU, 1)
    assert len(problems(options(*words, "--save_last_n_epochs=2", "--save_state", folder=folder))) == 1


def test_states_and_the_best_file_are_counted(folder):
    Image.new("RGB", (64, 64)).save(folder / "b.png")
    words = ["--max_train_epochs=10", "--save_every_n_epochs=1"]  # a state is three times as large as a file
    assert space(options(*words, "--save_state", folder=folder), folder) == 10 + 3 * 10
    assert space(options(*words, "--save_state", "--ema_decay=0.9", folder=folder), folder) == 10 + 4 * 10
    assert space(options(*words, "--save_state", "--save_last_n_epochs_state=1", folder=folder), folder) == 10 + 3 * 3
    assert space(options(*words, "--save_state_on_train_end", folder=folder), folder) == 10 + 3
    steps = ["--max_train_steps=100", "--save_every_n_steps=10", "--save_last_n_steps=20"]  # 3 are kept and 1 more is written
    assert space(options(*steps, folder=folder), folder) == 1 + 4
    assert space(options(*steps, "--save_state", "--save_last_n_steps_state=10", folder=folder), folder) == 1 + 4 + 3 * (3 + 1)
    held_out = dataset(folder, validation_split=0.5)
    chosen = options("--max_train_steps=1", folder=folder)
    assert needed(chosen, held_out)[folder / "out"] == 2 * file_sizes(chosen, full_size_header()).network


def test_latents_that_lie_there_already_need_no_space(folder):
    chosen = options("--cache_latents_to_disk", folder=folder)
    (folder / ".latents").mkdir()
    (folder / ".latents" / "a").write_bytes(bytes(1500))
    assert needed(chosen, dataset(folder))[folder] == 2 * 8 * 8 * 4 * 4 - 1500


@pytest.mark.parametrize("family, row_bytes", [("sd1", 77 * 768 * 4), ("sdxl", 77 * 2048 * 4)])
def test_encoded_captions_are_counted_once_each_beside_their_images(folder, family, row_bytes):
    Image.new("RGB", (64, 64)).save(folder / "b.png")
    Image.new("RGB", (64, 64)).save(folder / "c.png")
    for name, caption in (("a", "a cat"), ("b", "a dog"), ("c", "a cat")):
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    (folder / ".texts").mkdir()
    (folder / ".texts" / "one").write_bytes(bytes(1000))
    words = ["--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"]
    captioned = TrainingDataset(
        [DatasetConfig(resolution=(64, 64), subsets=(SubsetConfig(image_dir=folder, caption_extension=".txt"),))], seed=1
    )

    def written(*more: str) -> int:
        chosen = options(*words, *more, folder=folder)
        return disk_space.space_needed(chosen, Plan.of(chosen.training, 1), captioned, full_size_header(family))[folder]

    assert written() == 2 * row_bytes - 1000
    assert written("--mixed_precision=bf16", "--max_token_length=150") == 2 * (row_bytes // 77 // 2) * 152 - 1000


def test_memory_is_estimated_by_what_counts(folder):
    batch = largest_batch(dataset(folder))
    plain, half, saving, large = (
        estimated_bytes(options(*words, folder=folder), full_size_header(), *batch)
        for words in ([], ["--mixed_precision=fp16"], ["--gradient_checkpointing"], ["--network_dim=128"])
    )
    assert half < plain and saving < plain < large
    assert 4e9 < plain < 6e9  # full size, float32, one tiny image


def test_trap_55_memory_that_is_short_is_reported_with_what_helps(folder, monkeypatch, capsys):
    for there, short in ((2**33, False), (2**31, True)):
        monkeypatch.setattr(preflight, "available_memory", lambda device, there=there: (there, "the GPU's"))
        preflight.print_advice(options(folder=folder), dataset(folder), CPU, full_size_header())
        out = capsys.readouterr().out
        assert f"of the GPU's {there / 2**30:.1f} GiB will be used" in out and ("--gradient_checkpointing" in out) is short
    monkeypatch.undo()
    preflight.print_advice(options(folder=folder), dataset(folder), CPU, full_size_header())
    assert "of this machine's free" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, told",
    [([], True), (["--text_encoder_lr=1e-5"], False), (["--text_encoder_lr", "5e-5", "1e-5"], False),
     (["--network_train_unet_only"], False), (["--learning_rate=1e-5"], False), (["--optimizer_type=Prodigy"], False)],
)  # fmt: skip
def test_trap_40_text_encoders_that_learn_at_the_rate_of_the_u_net_are_reported(folder, words, told):
    notes = preflight.print_advice(options(*words, folder=folder), dataset(folder), CPU, full_size_header("sdxl"))
    assert any(note.startswith("all 2 text encoders learn at the U-Net's rate") for note in notes) is told
    notes = preflight.print_advice(options(*words, folder=folder), dataset(folder), CPU, full_size_header("sd1"))
    assert not any("text encoders" in note for note in notes)


def test_trap_53_going_on_from_a_lora_of_another_base_is_reported(folder, capsys):
    model, mine = folder / "model.safetensors", folder / "mine.safetensors"
    save_file({"a": torch.rand(600, 600)}, model)
    other = {"ss_sd_model_name": "animagine.safetensors", "ss_sd_model_hash": "12345678"}
    save_file({"a": torch.zeros(1)}, mine, other | {"ss_base_model_version": "sdxl_base_v0-9"})
    words = [f"--pretrained_model_name_or_path={model}", f"--network_weights={mine}", "--base_weights", str(mine)]
    words.append("--network_train_unet_only")
    notes = preflight.print_advice(options(*words, folder=folder), dataset(folder), CPU, full_size_header("sdxl"))
    assert f"--network_weights {mine} was trained on animagine.safetensors of SDXL 0.9" in notes[0]
    assert f"--base_weights {mine} was trained on animagine.safetensors of SDXL 0.9" in notes[1]
    assert f"--network_weights {mine} was trained on another file, animagine.safetensors" in notes[2]
    assert all(note in capsys.readouterr().out for note in notes[:1])
    save_file(
        {"a": torch.zeros(1)}, mine, {"ss_sd_model_name": "model.safetensors", "ss_sd_model_hash": legacy_hash_of_file(model)}
    )
    assert not any("was trained on" in note for note in preflight.print_advice(
        options(*words, folder=folder), dataset(folder), CPU, full_size_header("sdxl")
    ))  # fmt: skip


@pytest.mark.parametrize(
    "name, told",
    [("sdxl_turbo_v1.safetensors", True), ("dreamXL-Lightning.safetensors", True), ("hyperrealism.safetensors", False)],
)
def test_trap_54_a_base_distilled_to_few_steps_is_recognised_by_its_name(folder, capsys, name, told):
    chosen = options(f"--pretrained_model_name_or_path={name}", folder=folder)
    preflight.print_advice(chosen, dataset(folder), CPU, full_size_header())
    assert ("draws in few steps" in capsys.readouterr().out) is told
