from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from library.errors import RunFailed, UserError
from library.files import read_safetensors_metadata
from library.formats.tensor_file import read_safetensors
from library.training.options import OutputOptions
from library.training.outputs import saving
from library.training.outputs.saving import ModelFiles, NotSaved
from library.training.run_state import state
from tests.library.training.small_runs import AfterStep, image_folder, tensors_of, train, use_two_blocks, words_of_a_run


class Network(torch.nn.Module):
    """A network module of a third party, which checks nothing itself."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def save_weights(self, file, dtype, metadata):
        save_file({"w": torch.full((3,), self.value).to(dtype or torch.float32)}, file, metadata)


def files(folder, **options) -> ModelFiles:
    return ModelFiles(OutputOptions(output_dir=str(folder), **options))


def test_names_as_people_know_them(tmp_path):
    named, bare = files(tmp_path, output_name="my"), files(tmp_path, save_model_as="pt")
    assert [p.name for p in (named.epoch_path(3), named.step_path(20), named.final_path())] == [
        "my-000003.safetensors", "my-step00000020.safetensors", "my.safetensors",
    ]  # fmt: skip
    assert [p.name for p in (bare.epoch_path(3), bare.step_path(20), bare.final_path())] == [
        "epoch-000003.pt",
        "at-step00000020.pt",
        "last.pt",
    ]


@pytest.mark.parametrize("save_as", ["safetensors", "ckpt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_file_with_a_nan_appears_whatever_module_wrote_it(tmp_path, save_as, value):
    class Pickling(Network):
        def save_weights(self, file, dtype, metadata):
            torch.save({"w": torch.full((3,), self.value)}, file)

    network = Network(value) if save_as == "safetensors" else Pickling(value)
    with pytest.raises(RunFailed, match="w holds NaN"):
        files(tmp_path, save_model_as=save_as).save(tmp_path / f"a.{save_as}", network, {})
    assert not list(tmp_path.iterdir())


def takes(path) -> bool:
    """Whether the A1111 web UI takes the records of a pickled file (its modules/safe.py)."""
    with zipfile.ZipFile(path) as archive:
        return all(re.fullmatch(r"[^/]+/(data\.pkl|version|data/\d+)", name) for name in archive.namelist())


def test_a_pickled_file_of_any_module_has_the_records_that_the_a1111_web_ui_takes_and_no_others(tmp_path):
    class Pickling(Network):
        def save_weights(self, file, dtype, metadata):
            torch.save({"w": torch.full((3,), self.value), "v": torch.ones(2, dtype=torch.float16)}, file)

    path = tmp_path / "a.ckpt"
    Pickling(1.5).save_weights(tmp_path / "plain.ckpt", None, None)
    files(tmp_path, save_model_as="ckpt").save(path, Pickling(1.5), {})
    assert takes(path) and not takes(tmp_path / "plain.ckpt")  # torch's own writer has more
    content = torch.load(path, weights_only=True)
    assert content["w"].tolist() == [1.5] * 3 and content["v"].dtype == torch.float16


def test_fp16_that_overflows_is_not_written(tmp_path):
    with pytest.raises(RunFailed, match="NaN or infinity"):
        files(tmp_path, save_precision="fp16").save(tmp_path / "a.safetensors", Network(1e6), {})


def kept(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_epoch_rule_counts_files(tmp_path):
    rotation = files(tmp_path, output_name="m", save_last_n_epochs=2)
    for epoch in range(2, 11, 2):
        rotation.save(rotation.epoch_path(epoch), Network(1.0), {})
        rotation.remove_old_epoch(epoch, 2)
    assert kept(tmp_path) == ["m-000008.safetensors", "m-000010.safetensors"] == sorted(p.name for p in rotation.written)


def test_step_rule_counts_steps(tmp_path):
    rotation = files(tmp_path, output_name="m", save_last_n_steps=30)
    for step in range(10, 51, 10):
        rotation.save(rotation.step_path(step), Network(1.0), {})
        rotation.remove_old_step(step, 10)
    assert kept(tmp_path) == [f"m-step{step:08d}.safetensors" for step in (20, 30, 40, 50)]


def test_epoch_interval():
    assert files("o", save_every_n_epochs=3).epoch_interval(10) == 3
    assert files("o", save_n_epoch_ratio=4, save_every_n_epochs=3).epoch_interval(10) == 2
    assert files("o", save_n_epoch_ratio=40).epoch_interval(10) == 1
    assert files("o").epoch_interval(10) is None


class Failing(Network):
    """A network module whose writer fails as long as `refuses(file)`."""

    def __init__(self, error: Exception, refuses=lambda file: True):
        super().__init__(1.0)
        self.error, self.refuses = error, refuses
        self.weight = torch.nn.Parameter(torch.arange(3.0))

    def save_weights(self, file, dtype, metadata):
        if self.refuses(file):
            raise self.error
        super().save_weights(file, dtype, metadata)


FAILURES = [
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos 64 vs 0"),
    UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"),
    TypeError("metadata of this module must be bytes"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_weights_that_cannot_be_saved_under_their_name_are_kept_elsewhere(tmp_path, monkeypatch, error):
    there = tmp_path / "temporary"
    there.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(there))
    network = Failing(error, refuses=lambda file: str(tmp_path / "out") in file)
    rotation = files(tmp_path / "out", output_name="größe 1")
    with pytest.raises(NotSaved, match=r"its weights are in .*gr__e_1-rescued\.safetensors instead") as told:
        rotation.save(rotation.final_path(), network, {})
    assert "\n" not in str(told.value) and not rotation.written
    assert load_file(there / "gr__e_1-rescued.safetensors")["w"].tolist() == [1.0, 1.0, 1.0]
    assert not list((tmp_path / "out").iterdir())


def test_a_writer_that_never_works_leaves_its_networks_state(tmp_path):
    rotation = files(tmp_path, output_name="a")
    for count in range(2):
        with pytest.raises(NotSaved, match="rescued"):
            rotation.save(rotation.final_path(), Failing(TypeError("a bug")), {})
        assert kept(tmp_path) == ["a-rescued.safetensors", "a-rescued-1.safetensors"][: count + 1][::-1]
    assert load_file(tmp_path / "a-rescued.safetensors")["weight"].tolist() == [0, 1, 2]


def test_no_place_at_all_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(NotSaved, match=r"No space left.*no other folder took its weights"):
        files(tmp_path).save(tmp_path / "a.safetensors", Failing(OSError(28, "No space left on device")), {})
    assert not list(tmp_path.iterdir())


def test_a_nan_is_not_kept_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RunFailed, match="holds NaN"):
        files(tmp_path / "out").save(tmp_path / "out" / "a.safetensors", Network(float("nan")), {})
    assert kept(tmp_path) == ["out"] and not kept(tmp_path / "out")


@pytest.mark.parametrize("name", ["caf\udce9", "a\nb", "a\x1b[2J", "ü" * 101, "a/b"])
def test_an_output_name_that_cannot_be_a_file_is_reported_before_training(tmp_path, name):
    with pytest.raises(UserError, match="is no file name"):
        files(tmp_path, output_name=name).check_folder()


@pytest.mark.parametrize(
    "output_name, name",
    [("a", "a.safetensors/x"), ("a", "a-step00000002.safetensors/x"), ("a", "a-000001-state"), (None, "last.safetensors/x")],
)
def test_what_is_in_the_way_of_the_run_s_files_is_told_before_training(tmp_path, output_name, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    for other in ("a-b.safetensors", "b-state", "a.ckpt"):
        (tmp_path / other).mkdir()
    with pytest.raises(UserError, match=r" is a (folder|file), and the run writes its own there; move it, or give another"):
        files(tmp_path, output_name=output_name).check_folder()
    files(tmp_path, output_name="other").check_folder()


def test_the_folder_is_tried_with_the_library_that_writes(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: Permission denied (os error 13)")

    files(tmp_path / "good", output_name="ü" * 100).check_folder()
    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(UserError, match="--output_dir .* cannot be written: .*Permission denied"):
        files(tmp_path / "bad").check_folder()
    assert not kept(tmp_path / "good") and not kept(tmp_path / "bad")


# ---------------------------------------------------------------- whole runs


def test_a_full_disk_while_a_lora_is_saved_ends_in_one_line_that_says_where_it_is(tmp_path, monkeypatch):
    use_two_blocks(monkeypatch.setattr)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    save_file = safetensors.torch.save_file

    def full_out(tensors, path, *more, **named):
        if "elsewhere" not in str(path) and ".probe-" not in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, *more, **named)

    monkeypatch.setattr(safetensors.torch, "save_file", full_out)
    with pytest.raises(NotSaved, match=r"mine\.safetensors was not saved .*No space left.*its weights are in .*mine-rescued"):
        train(words_of_a_run(image_folder(tmp_path / "data"), tmp_path / "out", "--max_train_steps=2"))
    assert tensors_of(elsewhere / "mine-rescued.safetensors")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mine.html", "mine-page"}


def test_a_state_that_cannot_be_written_loses_no_weights(tmp_path, monkeypatch):
    use_two_blocks(monkeypatch.setattr)
    monkeypatch.setattr(state, "write_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"the state .* cannot be written: No space left.*until then is in .*mine-step00000002"):
        train(words_of_a_run(image_folder(tmp_path / "data"), tmp_path / "out", "--max_train_steps=2", "--save_state"))
    assert tensors_of(tmp_path / "out" / "mine-step00000002.safetensors")


def test_an_old_file_of_the_name_does_not_keep_what_is_trained_from_being_saved(tmp_path, monkeypatch):
    use_two_blocks(monkeypatch.setattr)
    data, out = image_folder(tmp_path / "data"), tmp_path / "out"
    old = out / "mine-step00000001.safetensors"
    out.mkdir()
    old.write_bytes(b"of an earlier run")

    def fail(run):
        raise UserError("it broke")

    with pytest.raises(UserError, match="it broke; what was trained until then is in"):
        train(words_of_a_run(data, out, "--max_train_steps=2"), AfterStep(fail))
    assert tensors_of(old)


def test_a_folder_that_is_no_utf8_takes_files_and_states_and_gives_them_back(tmp_path, not_utf8, monkeypatch):
    use_two_blocks(monkeypatch.setattr)
    words = words_of_a_run(image_folder(tmp_path / "data", count=2), not_utf8, "--save_state")
    train([*words, "--max_train_steps=1"])
    train([*words, "--max_train_steps=2", f"--resume={not_utf8}"])
    file = not_utf8 / "mine.safetensors"
    assert read_safetensors(file).keys() and read_safetensors_metadata(file)["ss_steps"] == "2"


def test_names_and_comments_that_are_no_utf8_are_trained_and_saved(tmp_path, monkeypatch):
    use_two_blocks(monkeypatch.setattr)
    data = image_folder(tmp_path / "data" / "1_caf\udce9", count=2)
    try:
        os.replace(data / "0.png", data / "\udc83e.png")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    words = ["--max_train_steps=1", "--save_state", "--training_comment=\udce9 $", "--metadata_title=\ud83d"]
    train([*words_of_a_run(tmp_path / "data", tmp_path / "out", *words)])
    with safe_open(tmp_path / "out" / "mine.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_training_comment"] == "\ufffd $" and metadata["modelspec.title"] == "\ufffd"
    assert list(json.loads(metadata["ss_dataset_dirs"])) == ["1_caf\ufffd"]
    train([*words_of_a_run(tmp_path / "data", tmp_path / "out", *words), "--max_train_steps=2", f"--resume={tmp_path / 'out'}"])
