"""Two processes over gloo do what one does, and end together."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from two_processes import ROOT, launch  # beside this file

from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingDataset
from library.models.saving import save_stable_diffusion
from library.testing import small_sdxl, small_stable_diffusion
from library.training.options import TrainingOptions, parse_options
from library.training.plan import Plan


def documented_command() -> tuple[list[str], list[str]]:
    """The command for two cards in docs/scaling.md: words for the launcher, words for train_network.py."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    commands = re.findall(r"^accelerate launch .*train_network\.py .*$", page, re.MULTILINE)
    assert len(commands) == 1, "teach this test the other commands of the page"
    words = shlex.split(commands[0])
    split = words.index("train_network.py")
    return words[2:split], words[split + 1 :]


COMMON = [
    "--max_train_epochs=2",
    "--train_batch_size=2",
    "--flip_aug",
    "--shuffle_caption",
    "--network_dim=2",
    "--noise_offset=0.1",
]
VALIDATED = [
    "--train_batch_size=1",
    "--max_train_steps=2",
    "--validation_split=0.4",
    "--validate_every_n_steps=1",
    "--network_dim=2",
]
TEXTS = [
    "--max_train_epochs=2",
    "--train_batch_size=2",
    "--network_train_unet_only",
    "--cache_text_encoder_outputs_to_disk",
]
WARM = ["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=3", "--network_args", "rank_dropout=0.2", "module_dropout=0.2"]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    """Smaller than the other tests' model: ten processes' worth of runs are made on it."""
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    model = small_stable_diffusion(unet_channels=(32, 64), vae_channels=(32, 32, 32, 32), text_width=32, text_layers=1)
    save_stable_diffusion(model, path)
    return path


@pytest.fixture(scope="module")
def sdxl_model(tmp_path_factory) -> Path:
    """The small SDXL."""
    path = tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors"
    model = small_sdxl(unet_channels=(32, 32, 32), depths=(1, 1, 1), vae_channels=(32, 32, 32, 32), text_width=32)
    save_stable_diffusion(model, path)
    return path


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory, base_model) -> Path:
    """Five images: three batches of two, which two processes cannot halve; and a folder where one of process 1 is broken."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copy(base_model, folder / "model.safetensors")
    (folder / "data.toml").write_text(
        '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "good"\n', encoding="utf-8"
    )
    for name in ("good", "bad"):
        (folder / name).mkdir()
        for number in range(5):
            Image.new("RGB", (64, 64), (number * 50, 80, 200 - number * 40)).save(folder / name / f"{number}.png")
    config = DatasetConfig(resolution=(64, 64), batch_size=2, subsets=(SubsetConfig(image_dir=folder / "bad"),))
    victim = Path(TrainingDataset([config], seed=1).paths(1, 1)[0])  # the first epoch's second batch is that of process 1
    victim.write_bytes(victim.read_bytes()[:-60])
    (folder / "prompts.txt").write_text("a cat --s 1 --d 1\na dog --s 1 --d 2\na cow --s 1 --d 3\n", encoding="utf-8")
    return folder


def words(work_folder: Path, base_model: Path, name: str, *more: str, data: str = "good") -> list[str]:
    return [
        f"--pretrained_model_name_or_path={base_model}", f"--train_data_dir={work_folder / data}", "--resolution=64",
        "--learning_rate=1e-3", f"--output_dir={work_folder / name}", "--output_name=mine", "--network_module=networks.lora",
        "--seed=1", "--max_data_loader_n_workers=0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(work_folder, base_model, sdxl_model):
    """All runs of the two processes; starting them costs more than the runs."""
    launcher, page_words = documented_command()
    small = ["--max_train_epochs=1", "--mixed_precision=no", "--max_data_loader_n_workers=0"]
    return launch(
        work_folder,
        launcher,
        {
            "page": [*page_words, *small],
            "same": words(work_folder, base_model, "same", *COMMON, *WARM, "--save_state", "--save_every_n_steps=3"),
            "resumed": words(
                work_folder, base_model, "resumed", *COMMON, *WARM, f"--resume={work_folder / 'same' / 'mine-step00000003-state'}"
            ),
            "cached": words(
                work_folder, base_model, "cached", *COMMON, "--cache_latents", "--network_train_unet_only",
                f"--sample_prompts={work_folder / 'prompts.txt'}", "--sample_at_first", "--save_every_n_epochs=1",
                f"--logging_dir={work_folder / 'logs'}",
            ),
            "validated": words(work_folder, base_model, "validated", *VALIDATED),
            "sdxl": words(work_folder, sdxl_model, "sdxl", *COMMON),
            "sdxl-texts": words(work_folder, sdxl_model, "sdxl-texts", *TEXTS),
            "broken": words(work_folder, base_model, "broken", *COMMON, data="bad"),
            "stopped": words(work_folder, base_model, "stopped", "--max_train_steps=50", "--interrupt_at=1,2"),
            "wrong": words(work_folder, base_model, "wrong", "--network_args", "conv_dm=4"),
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(work_folder, base_model):
    """The losses and the file of one process with twice the batches a step."""
    from accelerate.state import AcceleratorState
    from small_runs import Recorder

    from library.training.entry import train

    def start(name: str, *more: str, model: Path = base_model):
        AcceleratorState._reset_state(reset_partial_state=True)
        recorder, threads = Recorder(), torch.get_num_threads()
        torch.set_num_threads(
            1
        )  # as each of two has on two cores: sums in another order make other last digits, and Adam divides by them
        given = words(work_folder, model, name, *more, "--gradient_accumulation_steps=2")
        try:
            assert train(parse_options(given), [recorder]) == 0
        finally:
            torch.set_num_threads(threads)
        return recorder.runs[0]

    return start


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def assert_same(work_folder: Path, one: str, two: str) -> None:
    a, b = tensors(work_folder / one / "mine.safetensors"), tensors(work_folder / two / "mine.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-5)


def test_two_processes_train_as_one_with_twice_the_batches_a_step(outcomes, alone, work_folder):
    both, one = outcomes["same"], alone("same-alone", *COMMON, *WARM)
    assert [outcome.code for outcome in both] == [0, 0], both
    assert len(one.losses.values) == 6 and both[0].losses == both[1].losses
    assert both[0].losses == pytest.approx(one.losses.values, rel=1e-4)
    assert_same(work_folder, "same", "same-alone")


def test_the_command_of_the_page_on_scaling(outcomes, work_folder):
    assert [outcome.code for outcome in outcomes["page"]] == [0, 0], outcomes["page"]
    assert (work_folder / "out" / "mine.safetensors").is_file()


def test_trap_5_9_warm_up_counts_optimizer_steps_in_any_number_of_processes(outcomes):
    assert outcomes["same"][0].losses and outcomes["same"][0].rates == [1e-3, 1e-3]  # 4 steps, 3 of them warm-up


def test_a_state_saved_by_two_processes_goes_on_in_two_bit_for_bit(outcomes, work_folder):
    assert [outcome.code for outcome in outcomes["resumed"]] == [0, 0], outcomes["resumed"]
    whole, resumed = (tensors(work_folder / name / "mine.safetensors") for name in ("same", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert outcomes["resumed"][1].losses == outcomes["same"][0].losses


def test_validation_is_shared_out_and_measures_the_same(outcomes, alone, work_folder):
    assert [outcome.code for outcome in outcomes["validated"]] == [0, 0], outcomes["validated"]
    found = re.findall(r"^validation after step (\d+): ([\d.]+)", outcomes["validated"][0].printed, re.MULTILINE)
    wanted = alone("validated-alone", *VALIDATED).validator.record.history
    assert [int(step) for step, _ in found] == [step for step, _ in wanted] == [1, 2]
    assert [float(loss) for _, loss in found] == pytest.approx([loss for _, loss in wanted], abs=2e-5)
    assert (work_folder / "validated" / "mine-best.safetensors").is_file()


def test_trap_41_two_processes_train_both_text_encoders_of_sdxl_as_one_does(outcomes, alone, work_folder, sdxl_model):
    both, one = outcomes["sdxl"], alone("sdxl-alone", *COMMON, model=sdxl_model)
    assert [outcome.code for outcome in both] == [0, 0], both
    assert len(one.losses.values) == 6 and both[0].losses == both[1].losses == pytest.approx(one.losses.values, rel=1e-4)
    assert_same(work_folder, "sdxl", "sdxl-alone")


def test_captions_cached_on_disk_by_two_processes_are_those_of_one(outcomes, alone, work_folder, sdxl_model):
    both = outcomes["sdxl-texts"]
    assert [outcome.code for outcome in both] == [0, 0], both
    files = sorted((work_folder / "good" / ".texts").iterdir())
    one = alone("sdxl-texts-alone", *TEXTS, model=sdxl_model)
    assert sorted((work_folder / "good" / ".texts").iterdir()) == files and len(files) == 1  # found again, not made anew
    assert both[0].losses == both[1].losses == pytest.approx(one.losses.values, rel=1e-4)


def test_files_are_written_once_and_by_one_process(outcomes, work_folder):
    assert [outcome.code for outcome in outcomes["cached"]] == [0, 0], outcomes["cached"]
    names = sorted(path.name for path in (work_folder / "cached").iterdir() if path.suffix != ".png")
    assert names == ["mine-000001.safetensors", "mine-page", "mine.html", "mine.safetensors", "sample"]
    assert len(list((work_folder / "cached" / "sample").glob("*.png"))) == 3
    assert (work_folder / "cached" / "mine-samples.png").stat().st_size > 1000
    assert len(list((work_folder / "logs").rglob("events*"))) == 1


def test_the_main_process_alone_speaks(outcomes):
    main, other = outcomes["same"]
    assert other.printed == ""
    assert main.printed.count("plan: 4 steps of 2 batches (1 on each of 2 processes), 3 batches an epoch, 2 epochs") == 1


def test_an_error_on_one_process_ends_all_with_one_line(outcomes, work_folder):
    main, other = outcomes["broken"]
    assert main.code == other.code == 2
    assert (
        main.error.startswith("process 1: ")
        and ".png: cut off or damaged" in main.error
        and not other.error
        and "Traceback" not in main.error
    )


def test_an_error_on_all_processes_is_reported_once(outcomes):
    main, other = outcomes["wrong"]
    assert main.code == other.code == 2
    assert "conv_dm" in main.error and not other.error


def test_ctrl_c_on_one_process_stops_all_and_saves(outcomes, work_folder):
    main, other = outcomes["stopped"]
    assert main.code == other.code == 130, (main, other)
    saved = list((work_folder / "stopped").glob("mine-step*.safetensors"))
    assert len(saved) == 1 and "mine-step00000004" in saved[0].name  # asked after step 2, told with 3, known in 4


@pytest.mark.parametrize("batches, processes, accumulation", [(5, 2, 1), (7, 3, 2), (4, 8, 1), (12, 2, 3)])
def test_plan_deals_each_batch_to_one_step_once(batches, processes, accumulation):
    several = Plan.of(TrainingOptions(gradient_accumulation_steps=accumulation), batches, processes)
    single = Plan.of(TrainingOptions(gradient_accumulation_steps=accumulation * processes), batches)
    assert several.steps_per_epoch == single.steps_per_epoch and several.max_steps == single.max_steps
    sizes = [several.step_size(position) for position in range(0, several.micro_batches_per_epoch, accumulation)]
    assert sum(sizes) == batches and len(sizes) == several.steps_per_epoch
    assert sizes == [single.step_size(position) for position in range(0, batches, single.accumulation)]
