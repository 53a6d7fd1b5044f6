from __future__ import annotations

import shlex
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState
from PIL import Image
from safetensors import safe_open
from small_runs import image_folder, train, use_two_blocks, words_of_a_run
from transformers.optimization import Adafactor

from library.data.config import datasets_from_file
from library.data.config_keys import DatasetDefaults
from library.errors import UserError
from library.training.loop import Listener, Stop
from library.training.options import LogOptions, all_defaults, parse_options
from library.training.outputs.from_metadata import print_from_metadata, recorded_keys, split_outside_brackets
from library.training.outputs.metadata import other_options
from library.training.outputs.sample_grid import write_sample_grid
from library.training.outputs.step_log import StepLog
from library.training.outputs.trackers import Tracker, check_trackers, logged_options
from library.training.outputs.tracking import LossRecord
from library.training.plan import Progress
from library.training.step import StepReport


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that keeps what it is told."""
    PartialState()
    calls = []
    run = SimpleNamespace(log=lambda values, step=None: calls.append((values, step)), finish=lambda: calls.append("finished"))
    module = SimpleNamespace(
        run=run, init=lambda **words: calls.append(words) or run, login=lambda key: calls.append(key), Image=lambda image: image,
        config=SimpleNamespace(update=lambda values, allow_val_change: calls.append(values)),
        __spec__=SimpleNamespace(origin="wandb"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_gets_names_settings_values_and_images(wandb, tmp_path):
    (tmp_path / "t.toml").write_text('[wandb]\ntags = ["cat"]\n', encoding="utf-8")
    options = LogOptions(log_with="wandb", wandb_run_name="mine", log_tracker_name="cats", wandb_api_key="k",
                         log_tracker_config=str(tmp_path / "t.toml"))  # fmt: skip
    tracker = Tracker(options, {"learning_rate": 0.1})
    tracker.log({"loss/current": 1.0}, 7)
    tracker.log({"loss/epoch_average": 2.0}, 1, by_epoch=True)
    tracker.finish()
    assert wandb == [
        "k", {"project": "cats", "name": "mine", "tags": ["cat"]}, {"learning_rate": 0.1}, ({"loss/current": 1.0}, 7),
        ({"loss/epoch_average": 2.0, "epoch": 1}, 7), "finished",
    ]  # fmt: skip


def test_a_tracker_that_is_not_installed_names_what_to_install(tmp_path, monkeypatch):
    options = LogOptions(log_with="all", logging_dir=str(tmp_path / "logs"))
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace(__spec__=SimpleNamespace(origin="tensorboard")))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where no wandb is installed
    with pytest.raises(UserError, match="^--log_with wandb needs the package 'wandb'; run: pip install wandb$"):
        check_trackers(options)
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)  # a run without network leaves this folder, which is no package
    with pytest.raises(UserError, match="run: pip install wandb$"):
        check_trackers(options)


def test_a_tracker_that_lacks_something_names_what_to_install(wandb, monkeypatch):
    def broken(**words):
        raise ModuleNotFoundError("No module named 'platformdirs'")

    monkeypatch.setattr(sys.modules["wandb"], "init", broken)
    with pytest.raises(UserError, match="No module named 'platformdirs'; run: pip install --upgrade wandb$"):
        Tracker(LogOptions(log_with="wandb"))


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="these systems take Unicode names only")
@pytest.mark.parametrize("option", ["logging_dir", "log_prefix", "log_tracker_name"])
def test_tensorboard_takes_names_in_unicode_alone(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="tensorboard cannot start: .*surrogates.*; it takes names in Unicode alone: change --logging_dir"
    ):
        Tracker(LogOptions(**{"log_with": "tensorboard", "logging_dir": "logs", option: "caf\udce9"}))


def test_trap_5_4_each_rate_is_logged_once_under_its_own_name(wandb):
    tracker = Tracker(LogOptions(log_with="wandb"))
    tracker.log_step(1, {"textencoder": 1e-4, "unet": 2e-4}, {})
    assert wandb[-1] == ({"lr/textencoder": 1e-4, "lr/unet": 2e-4}, 1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_logged_for_a_step_is_that_step_s(wandb, monkeypatch, tmp_path, accumulation):
    """Losses and rates under the number of their step, the last one included, also where steps were skipped or saved at."""
    use_two_blocks(monkeypatch.setattr)
    rates = []

    class Used(Listener):
        def begin(self, run):
            run.step.update.optimizer.optimizer.register_step_pre_hook(
                lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
            )

    run = train(
        words_of_a_run(
            image_folder(tmp_path / "images"), tmp_path / "out", "--max_train_steps=7", "--log_with=wandb",
            "--save_every_n_steps=3", "--lr_scheduler=linear", "--lr_warmup_steps=2",
            f"--gradient_accumulation_steps={accumulation}", "--save_state",
        ),
        Used(),
    )  # fmt: skip
    logged = [(step, values) for values, step in (call for call in wandb if isinstance(call, tuple)) if "lr/unet" in values]
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6, 7]
    assert [values["lr/unet"] for _, values in logged] == rates and len(set(rates)) == 7
    for step, values in logged:
        own = [loss for at, loss in zip(run.losses.steps, run.losses.values, strict=True) if at == step]
        so_far = [loss for at, loss in zip(run.losses.steps, run.losses.values, strict=True) if at <= step][-5:]
        assert values["loss/current"] == sum(own) / len(own) and len(own) <= accumulation
        assert values["loss/average"] == pytest.approx(sum(so_far) / len(so_far))
    assert dict(run.losses.rates["unet"]) == dict(zip(range(1, 8), rates, strict=True)), "the plot shows the same"


def test_a_step_without_a_loss_is_logged_with_its_rates(wandb):
    record = LossRecord(window=2)
    log = StepLog(record, Tracker(LogOptions(log_with="wandb")))
    for step, loss in ((1, 4.0), (2, None), (3, 2.0)):
        if loss is not None:
            record.add(step, torch.tensor(loss), [])
        log.after_step(Progress(step, 1, step), StepReport({"unet": step / 10}, {}))
    log.at_end(Progress(3, 1, 3), Stop.DONE)
    log_of = {step: values for values, step in (call for call in wandb if isinstance(call, tuple))}
    assert log_of == {
        1: {"lr/unet": 0.1, "loss/current": 4.0, "loss/average": 4.0},
        2: {"lr/unet": 0.2},
        3: {"lr/unet": 0.3, "loss/current": 2.0, "loss/average": 3.0},
    }


def test_adafactor_s_own_rates_are_those_of_the_step(wandb, monkeypatch, tmp_path):
    """Its schedule computes them from the optimizer's state, so they are there only after the step."""
    use_two_blocks(monkeypatch.setattr)
    used = []
    own = Adafactor._get_lr
    monkeypatch.setattr(Adafactor, "_get_lr", staticmethod(lambda group, state: used.append(own(group, state)) or used[-1]))

    class Used(Listener):
        def begin(self, run):
            optimizer = run.step.update.optimizer.optimizer
            optimizer.register_step_pre_hook(lambda *_: used.clear())
            optimizer.register_step_post_hook(lambda *_: first.append(float(used[0])))

    first: list[float] = []
    words = ["--max_train_steps=4", "--log_with=wandb", "--optimizer_type=AdaFactor", "--network_train_unet_only"]
    train(words_of_a_run(image_folder(tmp_path / "images"), tmp_path / "out", *words), Used())
    logged = [values["lr/unet"] for values, _ in (call for call in wandb if isinstance(call, tuple)) if "lr/unet" in values]
    assert [float(rate) for rate in logged] == pytest.approx(first) and len(set(first)) > 1


def test_a_tracker_that_fails_is_reported_once_and_left_alone(wandb, capsys):
    tracker = Tracker(LogOptions(log_with="wandb"))

    def broken(values, step=None):
        raise OSError("no network")

    sys.modules["wandb"].run.log = broken
    tracker.log({"a": 1.0}, 1)
    tracker.log({"a": 1.0}, 2)
    assert capsys.readouterr().out.count("wandb logs no more: no network") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of files")
def test_a_full_disk_under_tensorboard_is_one_line_without_its_thread_s_traceback(tmp_path, capsys, monkeypatch):
    import resource

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would keep the half of what it compiles

    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    PartialState()
    tracker = Tracker(LogOptions(logging_dir=str(tmp_path)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        for step in range(3):
            tracker.log({"a": 1.0}, step)
        tracker.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().out.count("tensorboard logs no more: ") == 1 and tracebacks == []


def test_an_unknown_table_of_tracker_settings_is_an_error(tmp_path):
    (tmp_path / "t.toml").write_text("[wand]\na = 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="'wand' is not one of"):
        Tracker(LogOptions(log_with="wandb", log_tracker_config=str(tmp_path / "t.toml")))


def test_logged_options_hold_no_path_and_no_secret():
    options = parse_options([
        "--pretrained_model_name_or_path=/secret/m.safetensors", "--train_data_dir=d", "--output_dir=o",
        "--network_module=networks.lora", "--huggingface_token=hf_x", "--wandb_api_key=k", "--learning_rate=1e-3",
        "--keep_tokens=2",
    ])  # fmt: skip
    logged = logged_options(options)
    assert logged == {"learning_rate": 1e-3, "network_module": "networks.lora", "keep_tokens": 2}


@pytest.mark.option("log_with", "log_tracker_name", "wandb_run_name", "wandb_api_key", "log_tracker_config")
def test_a_run_gives_wandb_its_settings(wandb, monkeypatch, tmp_path):
    use_two_blocks(monkeypatch.setattr)
    (tmp_path / "t.toml").write_text('[wandb]\ntags = ["cat"]\n', encoding="utf-8")
    train(words_of_a_run(
        image_folder(tmp_path / "images", 1), tmp_path / "out", "--max_train_steps=2", "--log_with=wandb",
        "--log_tracker_name=cats", "--wandb_run_name=mine", "--wandb_api_key=k", f"--log_tracker_config={tmp_path / 't.toml'}",
        "--log_config",
    ))  # fmt: skip
    key, start, config, *values = wandb
    assert (key, start) == ("k", {"project": "cats", "name": "mine", "tags": ["cat"]})
    assert config["learning_rate"] == 1e-3 and "k" not in config.values() and str(tmp_path) not in str(config)
    assert any("loss/current" in value[0] for value in values if isinstance(value, tuple)) and values[-1] == "finished"


@pytest.mark.option("log_config")
def test_a_run_gives_tensorboard_its_settings(monkeypatch, tmp_path):
    use_two_blocks(monkeypatch.setattr)
    images = image_folder(tmp_path / "images", 1)
    for name, more in (("with", ["--log_config"]), ("without", [])):
        words = ["--max_train_steps=1", f"--logging_dir={tmp_path / name}", "--log_with=tensorboard", "--log_tracker_name=cats"]
        train(words_of_a_run(images, tmp_path / "out", *words, *more))
        (folder,) = (tmp_path / name).glob("*/cats")
        assert list(folder.glob("events*")) and [
            path.read_text().count("learning_rate: 0.001") for path in folder.rglob("*.yml")
        ] == [1] * len(more)


def test_the_grid_has_a_row_a_prompt_and_a_column_a_moment(tmp_path):
    for moment in ("e000000", "e000001", "e000002"):
        for number in range(2):
            Image.new("RGB", (64, 64), "red").save(tmp_path / f"mine_{moment}_{number:02d}_20260101000000_1.png")
    assert write_sample_grid(tmp_path, "mine", ["a cat", "a dog"], tmp_path / "grid.png")
    width, height = Image.open(tmp_path / "grid.png").size
    assert width > 3 * 256 and 2 * 256 < height < 3 * 256 + 100
    assert not write_sample_grid(Path(tmp_path / "none"), "mine", [], tmp_path / "no.png") and not (tmp_path / "no.png").exists()


@pytest.mark.parametrize(
    "words",
    [
        "--network_train_unet_only --lr_scheduler=cosine_with_min_lr --lr_scheduler_min_lr_ratio=0.1 --min_timestep=100 "
        "--ema_decay=0.9",
        "--lr_scheduler_type=StepLR --lr_scheduler_args step_size=2 gamma=0.5 --text_encoder_lr=1e-4 --caption_prefix=cat",
        "--optimizer_type=AdaFactor --weighted_captions --v_pred_like_loss=0.1 --network_args conv_dim=2",
    ],
    ids=["min_lr", "class", "AdaFactor"],
)
def test_the_command_from_the_metadata_is_accepted_and_says_the_same(words, monkeypatch, tmp_path, capsys):
    use_two_blocks(monkeypatch.setattr)
    words = words_of_a_run(image_folder(tmp_path / "10_cat", 1), tmp_path / "out", "--max_train_steps=1", *words.split())
    train(words)
    capsys.readouterr()
    print_from_metadata(str(tmp_path / "out" / "mine.safetensors"), all_defaults())
    with safe_open(tmp_path / "out" / "mine.safetensors", "pt") as file:
        assert {key for key in recorded_keys() if key.startswith("ss_")} <= file.metadata().keys(), (
            "else an option has no key at all"
        )
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("accelerate"))
    again, given = parse_options(shlex.split(command)[5:]), parse_options(words)
    for group in ("network", "optimizer", "loss", "precision", "validation", "training"):
        then, now = getattr(given, group), getattr(again, group)
        assert then.model_copy(update={"optimizer_type": ""}) == now.model_copy(update={"optimizer_type": ""})
    assert again.captions == given.captions


DATA = """[general]
shuffle_caption = true
[[datasets]]
caption_extension = ".txt"
resolution = [96, 64]
batch_size = 2
enable_bucket = true
min_bucket_reso = 64
bucket_reso_steps = 32
resize_interpolation = "area"
[[datasets.subsets]]
image_dir = "a"
caption_dropout_rate = 0.25
keep_tokens = 1
[[datasets.subsets]]
image_dir = "b"
is_reg = true
class_tokens = "a cat"
[[datasets]]
resolution = [64, 64]
validation_split = 0.5
validation_seed = 3
[[datasets.subsets]]
image_dir = "b"
metadata_file = "meta.json"
conditioning_data_dir = "masks"
token_warmup_step = 3.5
"""


def test_the_dataset_file_from_the_metadata_says_the_same(monkeypatch, tmp_path, capsys):
    use_two_blocks(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "masks"):
        image_folder(tmp_path / name, 2)
    Path("meta.json").write_text('{"0": {"caption": "x"}, "1": {"caption": "y"}}', encoding="utf-8")
    Path("given.toml").write_text(DATA, encoding="utf-8")
    train(words_of_a_run(tmp_path, tmp_path / "out", "--max_train_steps=1", "--masked_loss", "--dataset_config=given.toml"))
    capsys.readouterr()
    print_from_metadata(str(tmp_path / "out" / "mine.safetensors"), all_defaults())
    Path("again.toml").write_text(capsys.readouterr().out.partition("# mine.toml")[2], encoding="utf-8")
    assert datasets_from_file(Path("again.toml"), DatasetDefaults()) == datasets_from_file(Path("given.toml"), DatasetDefaults())


def test_options_without_a_key_of_their_own_are_recorded_without_paths():
    options = parse_options([
        "--pretrained_model_name_or_path=/secret/m.safetensors", "--train_data_dir=d", "--output_dir=o",
        "--network_module=networks.lora", "--mixed_precision=bf16", "--full_bf16", "--network_weights=/secret/l.safetensors",
        "--huggingface_token=hf_x", "--lr_scheduler_power=2",
    ])  # fmt: skip
    assert other_options(options) == {"full_bf16": True, "lr_scheduler_power": 2.0}


def test_arguments_of_an_optimizer_are_separated():
    assert split_outside_brackets("betas=(0.9, 0.99),weight_decay=0.1") == ["betas=(0.9,0.99)", "weight_decay=0.1"]
