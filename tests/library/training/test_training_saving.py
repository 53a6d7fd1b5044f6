from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from library.errors import RunFailed
from library.training.options import OutputOptions
from library.training.saving import ModelFiles


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
