"""Runs that were saved and resumed end as those that never stopped, bit for bit; what does not fit is refused in one line."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small_runs import AfterStep, image_folder, tensors_of, train, use_two_blocks, words_of_a_run

from library.command_line import groups_of
from library.errors import RunFailed, UserError
from library.training import setup
from library.training.checks.contradictions import contradictions
from library.training.options import TrainNetworkOptions, parse_options
from library.training.plan import Plan, Progress
from library.training.run_state.compatible import option_values
from library.training.setup import Run

UNET = ("--network_train_unet_only", "--cache_latents")
# Keys of a file that tell when it was made, or which run made it. The second hash covers them.
TIMES = {"ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date", "sshs_legacy_hash"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("state") / "images")


@pytest.fixture
def run(images, tmp_path, monkeypatch) -> Callable[..., Run]:
    """`run("a", "--max_train_steps=3")` trains into the folder `a` and gives the run as it was at the end."""
    use_two_blocks(monkeypatch.setattr)
    return lambda folder, *words, after=(): train(words_of_a_run(images, tmp_path / folder, *words), *after)


def interrupt(step: int) -> list[AfterStep]:
    """Ctrl-C comes in this step."""
    return [AfterStep(lambda run: signal.raise_signal(signal.SIGINT), step)]


def everything(run: Run) -> dict[str, Any]:
    """All that a run holds at its end, as it lies in memory."""
    return {
        "network": dict(run.network.module.named_parameters()) | dict(run.network.module.named_buffers()),
        "optimizer": run.step.update.optimizer.state_dict(),
        "schedule": run.step.update.schedule.state_dict(),
        "average": run.step.update.average.weights if run.step.update.average else None,
        "losses": (run.losses.steps, run.losses.values, run.losses.average, run.losses.rates),
        "validations": run.validator.record.state(),
        "progress": run.loop.progress,
    }


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dictionaries, lists, numbers and tensors are the same in every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


MANY = """
[general]
caption_extension = ".txt"
shuffle_caption = true
caption_dropout_rate = 0.3
flip_aug = true
[[datasets]]
resolution = 64
batch_size = 2
  [[datasets.subsets]]
  image_dir = "{0}"
[[datasets]]
resolution = 128
  [[datasets.subsets]]
  image_dir = "{0}"
  num_repeats = 1
"""

CASES = {
    "plain, in the middle of an epoch": [*UNET, "--max_train_steps=6"],
    "two datasets, workers, accumulation, captions that change": [
        "--max_train_steps=6", "--gradient_accumulation_steps=2", "--dataset_config=DATA", "--max_data_loader_n_workers=2",
        "--lr_scheduler=cosine", "--lr_warmup_steps=2", "--text_encoder_lr=1e-4",
    ],
    "averaged and validated, dropout": [
        *UNET, "--max_train_steps=7", "--ema_decay=0.9", "--validation_split=0.4", "--validate_every_n_steps=2",
        "--network_dropout=0.2", "--network_args", "rank_dropout=0.2", "module_dropout=0.2",
    ],
    "DyLoRA": [
        *UNET, "--max_train_steps=7", "--network_module=networks.dylora", "--network_dim=4", "--gradient_accumulation_steps=2",
    ],
    "schedule-free": [
        *UNET, "--max_train_steps=6", "--optimizer_type=AdamWScheduleFree", "--save_every_n_steps=1", "--learning_rate=1e-2",
    ],
    "Prodigy": [*UNET, "--max_train_steps=6", "--optimizer_type=Prodigy", "--learning_rate=1"],
    "AdaFactor with its own steps": [*UNET, "--max_train_steps=6", "--optimizer_type=AdaFactor"],
    "8-bit optimizer": [
        *UNET, "--max_train_steps=6", "--optimizer_type=AdamW8bit", "--network_dim=32", "--lr_scheduler=polynomial",
    ],
    "momentum, schedule of torch": [
        *UNET, "--max_train_steps=7", "--optimizer_type=SGDNesterov", "--lr_scheduler_type=OneCycleLR",
        "--lr_scheduler_args", "max_lr=0.1", "total_steps=9",
    ],
    "PiSSA, which also changes the model": [*UNET, "--max_train_steps=6", "--network_args", "init=pissa"],
}  # fmt: skip
EXTRAS = {"schedule-free": "schedulefree", "Prodigy": "prodigyopt"}  # packages that need not be installed


@pytest.mark.option("resume", "save_state")
@pytest.mark.parametrize("name", CASES)
def test_trap_5_1_and_5_2_resumed_twice_is_as_never_stopped(run, name, images, tmp_path):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    (tmp_path / "data.toml").write_text(MANY.format(images.as_posix()), encoding="utf-8")
    words = [f"--dataset_config={tmp_path / 'data.toml'}" if word == "--dataset_config=DATA" else word for word in CASES[name]]
    whole = run("whole", *words)
    total, parts = whole.plan.max_steps, tmp_path / "parts"
    run("parts", *words, "--save_state", after=interrupt(2))
    begun = []
    counted = AfterStep(lambda run: begun.append(run.loop.progress.step))
    middle = run(
        "parts", *words, "--save_state", f"--resume={parts / 'mine-step00000002-state'}", after=[*interrupt(total - 2), counted]
    )
    assert middle.loop.progress.step == total - 2 and middle.losses.steps[0] == 1, "trap 5.2: the counter goes on"
    part = run("parts", *words, "--save_state", f"--resume={parts}", after=[counted])
    assert begun == list(range(3, total + 1)), "each went on and did not begin anew"
    assert same(everything(whole), everything(part))
    assert len(part.losses.values) == len(whole.losses.values) >= total
    ours, theirs = tmp_path / "whole" / "mine.safetensors", parts / "mine.safetensors"
    assert same(tensors_of(ours), tensors_of(theirs))
    a, b = metadata_of(ours), metadata_of(theirs)
    assert a.keys() == b.keys() and {key for key in a if a[key] != b[key]} <= TIMES
    assert len({a["sshs_model_hash"], b["sshs_model_hash"]}) == 1
    assert set(states(parts)) >= {"mine-state", *(f"mine-step{step:08d}-state" for step in (2, total - 2))}


# ---------------------------------------------------------------- names, old ones, what a kill leaves


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.endswith("-page"))


@pytest.mark.option("save_state_on_train_end", "save_last_n_epochs_state", "save_last_n_steps_state")
def test_names_of_states_and_which_are_removed(run, tmp_path):
    words = [*UNET, "--max_train_epochs=4", "--save_every_n_epochs=1", "--save_last_n_epochs=3", "--save_last_n_epochs_state=2"]
    run("epochs", *words, "--save_state")
    assert states(tmp_path / "epochs") == ["mine-000002-state", "mine-000003-state", "mine-state"]
    assert (tmp_path / "epochs" / "mine-000001.safetensors").exists()
    words = [*UNET, "--max_train_steps=6", "--save_every_n_steps=1", "--output_name="]
    run("steps", *words, "--save_state", "--save_last_n_steps_state=2")
    assert states(tmp_path / "steps") == ["at-step00000004-state", "at-step00000005-state", "at-step00000006-state", "last-state"]
    run("end", *words, "--save_state_on_train_end", "--max_train_steps=2")
    assert states(tmp_path / "end") == ["last-state"]


# ---------------------------------------------------------------- what is not the same run


@pytest.fixture(scope="module")
def a_state(tmp_path_factory, images) -> Path:
    """The state of a run of two steps."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        use_two_blocks(patch.setattr)
        train(words_of_a_run(images, folder, *UNET, "--max_train_steps=2", "--save_state"))
    return folder / "mine-state"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--network_dim=3"], "--network_dim was 2 and is 3"),
        (
            ["--learning_rate=1e-4", "--min_snr_gamma=5"],
            "--learning_rate was 0.001 and is 0.0001; --min_snr_gamma was unset and is 5.0",
        ),
        (["--optimizer_type=SGD"], "--optimizer_type was unset and is SGD"),
        (["--ema_decay=0.9"], "--ema_decay was unset and is 0.9"),
        (["--network_args", "conv_dim=2"], "--network_args was unset"),
        (["--shuffle_caption"], "--shuffle_caption was False and is True"),
        (["--seed=2"], "the state's seed is 1 and --seed 2; leave out --seed"),
        (["--max_train_steps=1"], "2 steps done and 1 asked for in all"),
    ],
)
def test_a_state_of_another_run_is_refused_before_the_model_is_loaded(run, a_state, words, message, monkeypatch):
    monkeypatch.setattr("library.training.setup.load_stable_diffusion", lambda *args, **more: pytest.fail("the model was loaded"))
    with pytest.raises(UserError) as caught:
        run("out", *UNET, "--max_train_steps=4", *words, f"--resume={a_state}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_other_images_captions_and_models_are_refused(run, a_state, tmp_path, monkeypatch):
    words = [*UNET, "--max_train_steps=4", f"--resume={a_state}"]
    more = image_folder(tmp_path / "more" / "images", 6)
    with pytest.raises(UserError, match=r"the number of images changed \(5 then, 6 now\)"):
        run("out", *words, f"--train_data_dir={more}")
    (more / "5.png").unlink()
    (more / "2.txt").write_text("another text", encoding="utf-8")
    with pytest.raises(UserError, match="the captions changed; to go on from its weights"):
        run("out", *words, f"--train_data_dir={more}")
    image_folder(more)
    load = setup.load_stable_diffusion

    def other(*args, **kwargs):
        model = load()
        with torch.no_grad():
            next(model.denoiser.parameters()).add_(1e-3)
        return model

    monkeypatch.setattr(setup, "load_stable_diffusion", other)
    with pytest.raises(UserError, match="the base model has other weights"):
        run("out", *words, f"--train_data_dir={more}")


def test_what_may_differ_and_where_things_lie(run, a_state, tmp_path):
    """Folders moved, another output, more steps, workers: it goes on; --seed may be left out."""
    moved = image_folder(tmp_path / "elsewhere" / "images")
    words = [
        word for word in words_of_a_run(moved, tmp_path / "out", *UNET, "--max_train_steps=3") if not word.startswith("--seed")
    ]
    trained = train(
        [*words, f"--resume={a_state.parent}", "--output_name=new", "--save_every_n_steps=3", "--gradient_checkpointing"]
    )
    assert trained.loop.progress.step == 3 and trained.seed == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "new-page", "new-step00000003.safetensors", "new.html", "new.safetensors",
    ]  # fmt: skip


def test_killed_after_the_last_step_the_last_file_is_still_written(run, a_state, tmp_path, capsys):
    run("out", *UNET, "--max_train_steps=2", f"--resume={a_state}")
    assert same(tensors_of(tmp_path / "out" / "mine.safetensors"), tensors_of(a_state.parent / "mine.safetensors"))
    assert "only the last files are written" in capsys.readouterr().out


def test_a_network_that_is_nan_has_no_state(run, tmp_path):
    @torch.no_grad()
    def poison(run):
        run.network.parameters[0].fill_(torch.nan)

    with pytest.raises(RunFailed, match="no state was saved: .* holds NaN"):
        run("out", *UNET, "--max_train_steps=1", "--save_state", after=[AfterStep(poison)])
    assert states(tmp_path / "out") == []


# ---------------------------------------------------------------- where a run begins


def plan(batches: int, *words: str) -> tuple[Plan, Any]:
    needed = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]
    options = parse_options([*needed, *words])
    return Plan.of(options.training, batches), options.state


@pytest.mark.parametrize(
    "words, start",
    [
        ([], Progress(0, 1, 0)),
        (["--initial_epoch=3"], Progress(6, 3, 0)),
        (["--initial_epoch=3", "--initial_step=4"], Progress(4, 2, 0)),
        (["--initial_step=4", "--skip_until_initial_step"], Progress(4, 2, 4)),
        (["--initial_epoch=2", "--skip_until_initial_step"], Progress(3, 2, 0)),
    ],
)
def test_trap_5_3_the_start_is_counted_in_optimizer_steps(words, start):
    """10 batches, 4 a step: 3 steps an epoch, of 4, 4 and 2 batches."""
    assert (
        Progress.at_start(*reversed(plan(10, "--gradient_accumulation_steps=4", "--max_train_epochs=9", *words)), None) == start
    )


def test_a_state_goes_on_from_its_own_step_unless_options_name_another():
    own = Progress(5, 2, 8)
    for words, start in (([], own), (["--initial_step=5"], own), (["--skip_until_initial_step", "--resume=x"], own),
                         (["--initial_step=6"], Progress(6, 3, 0))):  # fmt: skip
        assert Progress.at_start(*reversed(plan(10, "--gradient_accumulation_steps=4", *words)), own) == start
    with pytest.raises(UserError, match="nothing is left to train"):
        Progress.at_start(*reversed(plan(10, "--max_train_steps=5", "--initial_step=5")), None)


def test_trap_5_2_an_initial_step_is_the_real_step(run, tmp_path):
    words = [*UNET, "--max_train_steps=8", "--lr_scheduler=linear", "--save_every_n_steps=2"]
    whole = run("whole", *words)
    part = run("part", *words, "--initial_step=6", "--skip_until_initial_step")
    assert sorted(path.name for path in (tmp_path / "part").glob("*-step*")) == ["mine-step00000008.safetensors"]
    assert part.losses.steps == [7, 8] and part.step.update.schedule.get_last_lr() == whole.step.update.schedule.get_last_lr()
    assert part.loop.progress == whole.loop.progress == Progress(8, 2, 3)
    anew = run("anew", *words, "--initial_step=6")
    assert anew.loop.progress == Progress(8, 2, 2), "without it the data of the epoch begin anew"
    (problem,) = contradictions(parse_options(words_of_a_run(tmp_path, tmp_path, "--skip_until_initial_step")))
    assert problem.startswith("--skip_until_initial_step needs")


def test_what_a_resumed_run_needs_alike_is_declared_with_the_options():
    free = {name for name, group in groups_of(TrainNetworkOptions).items() if not group.decides_what_is_trained}
    assert free == {"state", "output", "metadata", "hub", "previews", "logs"}
    compared = option_values(parse_options(["--vae=folder/v.safetensors"]))
    assert compared["vae"] == "v.safetensors" and compared["learning_rate"] == 2e-6 and "xformers" not in compared
    assert not compared.keys() & {"output_name", "save_every_n_steps", "max_train_steps", "seed"}
