"""Whole runs on the small model, through the real options."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import AfterStep, Recorder

from library import __version__
from library.errors import RunFailed, UserError
from library.models.loading import load_stable_diffusion
from library.models.saving import save_stable_diffusion
from library.processes import Processes
from library.testing import small_stable_diffusion
from library.training import setup
from library.training.options import parse_options
from library.training.plan import Plan, Progress
from library.training.randomness import seed_everything
from library.training.setup import Run
from library.training.validation import Validation

# ---------------------------------------------------------------- files and their names


@pytest.mark.option("save_every_n_epochs", "save_every_n_steps", "save_last_n_epochs")
def test_files_of_a_run(run, loss_plot):
    result = run(
        "--max_train_epochs=4", "--save_every_n_epochs=1", "--save_last_n_epochs=2", "--save_every_n_steps=5", "--network_dim=2"
    )
    assert result.code == 0
    assert result.files() == [
        "mine-000002.safetensors", "mine-000003.safetensors", "mine-loss.png", "mine-page", "mine-step00000005.safetensors",
        "mine-step00000010.safetensors", "mine-step00000015.safetensors", "mine.html", "mine.safetensors",
    ]  # fmt: skip
    assert result.metadata("mine-000002.safetensors")["ss_epoch"] == "2"
    assert result.metadata("mine-step00000010.safetensors")["ss_epoch"] == "2"
    assert result.metadata()["ss_epoch"] == "4" and result.metadata()["ss_steps"] == "16"
    assert all(t.dtype == torch.float32 for t in result.tensors().values())


@pytest.mark.option("save_last_n_steps")
def test_step_files_older_than_save_last_n_steps_are_removed(run):
    result = run(
        "--max_train_steps=6", "--save_every_n_steps=1", "--save_last_n_steps=3", "--network_train_unet_only", "--cache_latents"
    )
    assert [name for name in result.files() if "step" in name] == [f"mine-step{n:08d}.safetensors" for n in (3, 4, 5, 6)]


@pytest.mark.option("save_model_as", "save_precision")
@pytest.mark.parametrize("kind", ["ckpt", "pt"])
def test_pickled_formats_and_precision(run, kind):
    result = run("--max_train_steps=1", f"--save_model_as={kind}", "--save_precision=fp16")
    tensors = torch.load(result.folder / f"mine.{kind}", weights_only=True)
    assert tensors and all(tensor.dtype == torch.float16 for tensor in tensors.values())


@pytest.mark.option("save_n_epoch_ratio")
def test_save_n_epoch_ratio(run):
    result = run("--max_train_epochs=4", "--save_n_epoch_ratio=2", "--cache_latents", "--network_train_unet_only")
    assert [name for name in result.files() if name.startswith("mine-0")] == ["mine-000002.safetensors"]


# ---------------------------------------------------------------- which parts train


def changed(result) -> set[str]:
    """Parts of the network whose up weights left zero."""
    return {key.split("_")[1] for key, tensor in result.tensors().items() if "lora_up" in key and tensor.any()}


@pytest.mark.option("network_train_unet_only", "network_train_text_encoder_only")
@pytest.mark.parametrize(
    "words, parts",
    [
        ([], {"te", "unet"}),
        (["--network_train_unet_only"], {"unet"}),
        (["--network_train_text_encoder_only"], {"te"}),
        (["--text_encoder_lr=0"], {"unet"}),
        (["--unet_lr=0"], {"te"}),
    ],
)
def test_only_what_is_asked_for_is_trained(run, words, parts):
    result = run("--max_train_steps=2", *words)
    assert changed(result) == parts
    assert {key.split("_")[1] for key in result.tensors()} == parts


@pytest.mark.option("unet_lr", "text_encoder_lr")
def test_learning_rates_reach_their_groups(run, recorder):
    run("--max_train_steps=1", "--unet_lr=1e-4", "--text_encoder_lr=5e-5", recorder)
    (made,) = recorder.runs
    rates = dict(zip(made.network.group_names, (g["lr"] for g in made.step.update.optimizer.param_groups), strict=True))
    assert rates == {"unet": 1e-4, "textencoder": 5e-5}


@pytest.fixture
def recorder() -> Recorder:
    """A listener that keeps the runs to which it is given."""
    return Recorder()


class BeforeUpdates(Recorder):
    """Calls `action(run)` before every step of the optimizer."""

    def __init__(self, action) -> None:
        super().__init__()
        self.action = action

    def begin(self, run: Run) -> None:
        super().begin(run)
        run.step.update.optimizer.optimizer.register_step_pre_hook(lambda *_: self.action(run))


class InForward(Recorder):
    """What the U-Net gives in step `step` is `change(output)`."""

    def __init__(self, step: int, change) -> None:
        super().__init__()
        self.step, self.change = step, change

    def begin(self, run: Run) -> None:
        super().begin(run)
        run.model.denoiser.register_forward_hook(
            lambda module, inputs, output: self.change(output) if run.loop.progress.step + 1 == self.step else output
        )


# ---------------------------------------------------------------- the same again


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two files hold the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.option("seed")
def test_same_seed_gives_the_same_bytes_with_any_number_of_workers_and_with_previews(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 2\n", encoding="utf-8")
    words = ["--max_train_steps=6", "--train_batch_size=2", "--flip_aug", "--shuffle_caption", "--caption_dropout_rate=0.3"]
    first = run(*words).tensors()
    for more in (
        ["--max_data_loader_n_workers=1", "--persistent_data_loader_workers"],
        ["--max_data_loader_n_workers=4"],
        [f"--sample_prompts={prompts}", "--sample_every_n_steps=2"],
    ):
        assert same(first, run(*words, *more).tensors()), more
    assert not same(first, run(*words, "--seed=2").tensors())


def test_gradient_checkpointing_changes_nothing_but_rounding(run):
    plain, checkpointed = (run("--max_train_steps=2", *words).tensors() for words in ([], ["--gradient_checkpointing"]))
    for key, tensor in plain.items():
        torch.testing.assert_close(checkpointed[key], tensor, rtol=1e-3, atol=1e-5)


def test_seeds_differ_by_batch_and_not_by_history():
    seed_everything(1, 1, 0)
    first = torch.rand(3)
    torch.rand(100)
    seed_everything(1, 1, 0)
    assert torch.equal(first, torch.rand(3))
    seed_everything(1, 1, 1)
    assert not torch.equal(first, torch.rand(3))


# ---------------------------------------------------------------- steps, epochs, accumulation


def plan(batches: int, *words: str) -> Plan:
    needed = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]
    return Plan.of(parse_options([*needed, *words]).training, batches)


@pytest.mark.option("max_train_epochs", "gradient_accumulation_steps")
def test_plan_arithmetic():
    assert plan(10).epochs == 160 and plan(10).max_steps == 1600
    assert plan(10, "--max_train_epochs=3", "--gradient_accumulation_steps=4") == Plan(10, 4, 3, 9, 3)
    last = plan(10, "--gradient_accumulation_steps=4")
    assert [last.step_size(p) for p in (0, 4, 8)] == [4, 4, 2]
    progress, seen = Progress(), []
    for _ in range(4):
        progress = progress.after_step(last)
        seen.append((progress.step, progress.epoch, progress.position))
        progress = progress.after_epoch(last)
    assert seen == [(1, 1, 4), (2, 1, 8), (3, 1, 10), (4, 2, 4)]


def test_accumulated_gradients_are_the_mean_over_the_batches_of_a_step(run):
    seen = []
    gradients = BeforeUpdates(lambda run: seen.append([p.grad.clone() for p in run.network.parameters]))
    words = ["--network_train_unet_only", "--max_grad_norm=0", "--learning_rate=1e-30", "--optimizer_type=SGD"]
    run("--max_train_steps=4", *words, gradients)
    single, _ = list(seen), seen.clear()
    run("--max_train_steps=1", "--gradient_accumulation_steps=4", *words, gradients)
    assert len(gradients.runs) == 2 and len(single) == 4 and len(seen) == 1
    for index, accumulated in enumerate(seen[0]):
        torch.testing.assert_close(accumulated, sum(g[index] for g in single) / 4, rtol=1e-4, atol=1e-7)


def test_trap_5_8_warm_up_is_counted_in_optimizer_steps(run):
    rates = []
    used = BeforeUpdates(lambda run: rates.append(run.step.update.optimizer.param_groups[0]["lr"]))
    run("--max_train_steps=4", "--gradient_accumulation_steps=2", "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=2",
        "--network_train_unet_only", "--cache_latents", used)  # fmt: skip
    assert rates == pytest.approx([0, 0.5e-3, 1e-3, 1e-3])
    assert used.runs[0].loop.progress.step == 4


# ---------------------------------------------------------------- learning


def loss_at_fixed_noise(run: Run) -> float:
    """Mean loss over the images at four fixed timesteps with noise that training never drew."""
    run.network.module.eval()
    timesteps = [200, 400, 600, 800]
    options, device = run.options.validation, torch.device("cpu")
    return Validation(run.data.train, options, device, Processes(), seed=999, timesteps=timesteps, num_workers=0).loss(
        run.step.loss.unweighted
    )


def test_learning_happens_and_each_part_helps(run, recorder, tmp_path):
    base, losses = tmp_path / "base.safetensors", {}
    save_stable_diffusion(small_stable_diffusion(vae_channels=(32, 32, 32, 32)), base)
    for name, words in {"both": [], "unet": ["--text_encoder_lr=0"], "text": ["--unet_lr=0"]}.items():
        run("--max_train_steps=30", "--train_batch_size=4", "--cache_latents", "--network_dim=8", "--network_alpha=8",
            f"--pretrained_model_name_or_path={base}", *words, recorder)  # fmt: skip
        losses[name] = loss_at_fixed_noise(recorder.runs[-1])
        recorder.runs[-1].network.module.set_multiplier(0)
        start = loss_at_fixed_noise(recorder.runs[-1])
    assert losses["both"] < losses["unet"] < start and losses["both"] < losses["text"] < start
    # Measured: 1.10 of 1.37; the text encoder's part is worth 0.02, the U-Net's 0.18.
    assert losses["both"] < 0.85 * start
    assert losses["unet"] - losses["both"] > 0.005 and losses["text"] - losses["both"] > 0.05


# ---------------------------------------------------------------- things that go wrong


def nan_in_step_3() -> InForward:
    def change(output):
        output.sample = output.sample * math.nan
        return output

    return InForward(3, change)


def test_a_loss_of_nan_stops_the_run_names_step_and_image_and_saves_nothing(run):
    with pytest.raises(RunFailed, match=r"nan at step 3 \(images: .*\.png\)"):
        run("--max_train_steps=6", "--save_every_n_steps=1", nan_in_step_3())


@pytest.mark.option("on_nonfinite_loss")
def test_a_loss_of_nan_can_be_skipped(run):
    result = run("--max_train_steps=4", "--on_nonfinite_loss=skip", nan_in_step_3())
    assert result.metadata()["ss_steps"] == "4"
    assert all(torch.isfinite(tensor).all() for tensor in result.tensors().values())


def test_nan_weights_are_never_saved(run, tmp_path):
    @torch.no_grad()
    def poison(run):
        run.network.parameters[0].fill_(math.nan)

    with pytest.raises(RunFailed, match="NaN"):
        run("--max_train_steps=1", AfterStep(poison))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(run, loss_plot, capsys):
    def interrupt(output):
        signal.raise_signal(signal.SIGINT)
        return output

    before = signal.getsignal(signal.SIGINT)
    result = run("--max_train_steps=9", InForward(2, interrupt))
    assert result.code == 130
    assert result.files() == ["mine-loss.png", "mine-page", "mine-step00000002.safetensors", "mine.html"]
    assert result.metadata("mine-step00000002.safetensors")["ss_steps"] == "2"
    assert result.metadata("mine-step00000002.safetensors")["ss_epoch"] == "0"
    assert "--network_weights=" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.option("pretrained_model_name_or_path", "output_dir", "output_name", "v2")
@pytest.mark.parametrize(
    "words, part",
    [
        (["--network_module=network.lora"], "networks.lora"),
        (["--network_module=networks.low_ra"], "networks.lora"),
        (["--network_args", "conv_dm=4"], "conv_dim"),
        (["--network_args", "conv_dim"], "key=value"),
        (["--mixed_precision=fp16"], "bf16 or no"),
        (["--network_weights=missing.safetensors"], "missing.safetensors"),
        (["--pretrained_model_name_or_path=/no/such/model.safetensors"], "model.safetensors"),
        (["--learning_rate=0"], "learning"),
        ([f"--output_dir={__file__}/out"], "--output_dir .*out cannot be written"),
        (["--lr_scheduler=cosin"], "cosine"),
        (["--vae=no/such/vae.pt"], "vae.pt"),
        (["--output_name=../evil"], "--output_name"),
        (["--output_name=" + "x" * 300], "--output_name"),
        ([f"--logging_dir={__file__}/logs"], "--logging_dir"),
        (["--network_module=networks/lora.py"], "'networks.lora'"),
        (["--v2"], "SD 1.x"),
    ],
)
def test_wrong_input_is_one_line(run, words, part):
    with pytest.raises(UserError, match=part) as caught:
        run("--max_train_steps=1", *words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [["--network_args", "conv_dm=4"], ["--lr_scheduler=cosin"], ["--optimizer_type=AdmW"], [f"--output_dir={__file__}/out"]],
)
def test_what_is_misspelt_is_found_before_the_model_is_loaded(run, monkeypatch, words):
    monkeypatch.setattr(setup, "load_stable_diffusion", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(UserError):
        run(*words)


def test_what_was_trained_is_kept_when_an_image_cannot_be_read(run, tmp_path):
    image = tmp_path / "data" / "a.png"
    image.parent.mkdir()
    Image.new("RGB", (64, 64), "red").save(image)
    with pytest.raises(UserError, match=r"a\.png.*what was trained until then is in .*mine-step0000000\d\.safetensors"):
        run("--max_train_steps=9", AfterStep(lambda run: image.unlink(), 3), data=f"--train_data_dir={image.parent}")
    assert len(list(tmp_path.rglob("mine-step*.safetensors"))) == 1


def test_a_bug_or_a_full_memory_keeps_what_was_trained_too(run, tmp_path):
    for error, raised, words in (
        (ZeroDivisionError(), ZeroDivisionError, ""),
        (torch.OutOfMemoryError("full"), RunFailed, "--cache_latents"),
    ):

        def fail(output, error=error):
            raise error

        with pytest.raises(raised, match=words):
            run("--max_train_steps=3", "--network_train_unet_only", "--cache_latents", InForward(2, fail))
    assert len(list(tmp_path.rglob("mine-step00000001.safetensors"))) == 2


def test_trap_56_a_sample_image_that_fails_never_ends_the_run(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a cat --s 1\na dog --s 1\n", encoding="utf-8")
    from library.generation.pipeline.pipeline import Pipeline

    generate = Pipeline.generate

    def failing(pipeline, specs, **more):
        if specs[0].prompt == "a cat":
            raise RuntimeError("no memory\nat all")
        return generate(pipeline, specs, **more)

    monkeypatch.setattr(Pipeline, "generate", failing)
    result = run(
        "--max_train_steps=1", f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_at_first", "--network_train_unet_only"
    )
    assert "sample 0 failed: no memory at all" in capsys.readouterr().out
    assert len(list((result.folder / "sample").iterdir())) == 1 and "mine.safetensors" in result.files()


def test_trap_5_18_the_default_learning_rate_gets_a_warning(run, capsys):
    run("--max_train_steps=1", "--learning_rate=2e-6", "--cache_latents", "--network_train_unet_only")
    assert "1e-4 is usual" in capsys.readouterr().out


# ---------------------------------------------------------------- starting from files


@pytest.mark.option("network_weights", "dim_from_weights", "network_dim")
def test_continuing_from_a_file(run):
    first = run("--max_train_steps=2", "--network_dim=2")
    weights = f"--network_weights={first.folder / 'mine.safetensors'}"
    frozen = run("--max_train_steps=1", "--network_dim=2", "--learning_rate=1e-30", weights)
    torch.testing.assert_close(frozen.tensors(), first.tensors())
    with pytest.raises(UserError, match="--dim_from_weights"):
        run("--max_train_steps=1", "--network_dim=4", weights)
    taken = run("--max_train_steps=1", "--dim_from_weights", weights)
    assert taken.metadata()["ss_network_dim"] == "2" and taken.metadata()["ss_network_alpha"] == "1.0"
    assert {t.shape for t in taken.tensors().values()} == {t.shape for t in first.tensors().values()}


@pytest.mark.parametrize("words", [[], ["--dim_from_weights"], ["--base_weights"]])
def test_a_lora_that_is_not_finite_is_named_before_a_step(run, words):
    first = run("--max_train_steps=1", "--network_dim=2")
    tensors = first.tensors()
    key = next(name for name in tensors if name.endswith("lora_down.weight"))
    tensors[key].view(-1)[0] = float("nan")
    bad = first.folder / "bad.safetensors"
    save_file(tensors, bad)
    option = "--base_weights" if "--base_weights" in words else "--network_weights"
    with pytest.raises(UserError, match=f"{option} .*bad.safetensors: {key} holds NaN or infinity, .*; take an earlier file"):
        run("--max_train_steps=1", "--network_dim=2", f"{option}={bad}", *(word for word in words if word != option))


@pytest.mark.option("base_weights", "base_weights_multiplier")
def test_base_weights_are_merged_into_the_model(run, recorder):
    first = run("--max_train_steps=2", "--network_dim=2", "--learning_rate=1e-1")
    run("--max_train_steps=1", "--network_dim=2", recorder)
    run(
        recorder,
        "--max_train_steps=1",
        "--network_dim=2",
        f"--base_weights={first.folder / 'mine.safetensors'}",
        "--base_weights_multiplier=0.5",
    )
    plain, merged = (t.model.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.weight for t in recorder.runs)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"
    tensors = first.tensors()
    delta = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] * tensors[f"{name}.alpha"] / 2
    torch.testing.assert_close(merged - plain, delta * 0.5, rtol=1e-3, atol=1e-6)
    assert delta.abs().max() > 1e-4


@pytest.mark.option("scale_weight_norms")
def test_scale_weight_norms_bounds_every_module(run):
    tensors = run("--max_train_steps=3", "--learning_rate=1e-1", "--scale_weight_norms=0.01").tensors()
    names = [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]
    norms = []
    for name in names:
        up, down = tensors[f"{name}.lora_up.weight"].flatten(1), tensors[f"{name}.lora_down.weight"].flatten(1)
        norms.append((up @ down).norm() * tensors[f"{name}.alpha"] / len(down))
    assert max(norms) <= 0.01 * 1.001 and max(norms) > 0.009


# ---------------------------------------------------------------- cached text and latents, precision


def test_cached_texts_are_what_the_text_encoder_says(run, recorder):
    run("--max_train_steps=1", "--network_train_unet_only", recorder)
    (made,) = recorder.runs
    loss, dataset = made.step.loss, made.data.train
    cached = loss.conditioning(dataset[(1, 0)])["context"]
    assert next(made.model.text_encoders[0].parameters()).is_meta  # freed: nothing needs it any more
    dataset.texts = None
    loss.model = load_stable_diffusion(made.options.model.pretrained_model_name_or_path)
    torch.testing.assert_close(cached, loss.conditioning(dataset[(1, 0)])["context"], rtol=1e-4, atol=1e-5)


def test_texts_that_change_or_are_trained_are_not_cached(run, recorder):
    run("--max_train_steps=1", recorder)
    run("--max_train_steps=1", "--network_train_unet_only", "--shuffle_caption", "--caption_separator= ", recorder)
    assert [made.data.train.texts for made in recorder.runs] == [None, None]


@pytest.mark.option("cache_latents")
def test_cached_latents_are_the_vae_s(run, recorder):
    run("--max_train_steps=1", "--cache_latents", "--vae_batch_size=3", "--network_train_unet_only", recorder)
    run("--max_train_steps=1", "--network_train_unet_only", recorder)
    batches = [made.data.train[(1, 0)] for made in recorder.runs]
    assert [batch.latents is not None for batch in batches] == [True, False]
    cached, plain = (made.step.loss.latents(batch) for made, batch in zip(recorder.runs, batches, strict=True))
    torch.testing.assert_close(cached, plain, rtol=0.05, atol=0.05)  # two samples of one narrow posterior


def test_bf16_trains_on_a_cpu(run):
    result = run(
        "--max_train_steps=1", "--mixed_precision=bf16", "--network_train_unet_only", "--cache_latents", "--network_dim=1"
    )
    assert changed(result) == {"unet"}


@pytest.mark.option("clip_skip", "max_token_length", "weighted_captions")
@pytest.mark.parametrize("words", [["--noise_offset=0.5"], ["--min_snr_gamma=1e-4"], ["--v_parameterization"], ["--clip_skip=2"],
                                   ["--max_token_length=150"], ["--weighted_captions"]])  # fmt: skip
def test_options_of_the_loss_and_the_text_do_something(run, recorder, words, tmp_path, images):
    folder = tmp_path / "weighted"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("a (red:1.5) square " + "long " * 90, encoding="utf-8")
    losses = []
    for more in ([], words):
        run("--max_train_steps=1", *more, recorder, data=f"--train_data_dir={folder}")
        losses.append(recorder.runs[-1].losses.values[0])
    assert losses[0] != losses[1]


@pytest.mark.option("prior_loss_weight", "reg_data_dir", "train_data_dir")
def test_prior_loss_weight_is_for_regularisation_images_only(run, recorder, images, tmp_path):
    train_folder, reg_folder = tmp_path / "t" / "1_cat", tmp_path / "r" / "1_animal"
    for folder, colour in ((train_folder, "red"), (reg_folder, "blue")):
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(folder / "a.png")
    data = f"--train_data_dir={tmp_path / 't'}"
    run("--max_train_epochs=1", f"--reg_data_dir={tmp_path / 'r'}", "--prior_loss_weight=0", recorder, data=data)
    losses = recorder.runs[0].losses.values
    assert sorted(loss == 0 for loss in losses) == [False, True]


# ---------------------------------------------------------------- metadata, previews, logs

OF_METADATA = [
    "metadata_title", "metadata_author", "metadata_description", "metadata_license", "metadata_tags", "metadata_usage_hint",
    "metadata_trigger_phrase", "metadata_merged_from", "metadata_preprocessor", "metadata_is_negative_embedding",
]  # fmt: skip


@pytest.mark.option(
    "training_comment",
    "metadata_title",
    "metadata_author",
    "metadata_description",
    "metadata_license",
    "metadata_tags",
    "metadata_usage_hint",
    "metadata_trigger_phrase",
    "metadata_merged_from",
    "metadata_preprocessor",
    "metadata_is_negative_embedding",
)
def test_metadata(run, base_model, images):
    result = run(
        "--max_train_steps=1", "--network_args", "conv_dim=2", "--training_comment=hello", "--optimizer_args", "weight_decay=0.1",
        *(f"--{option}=my {option}" for option in OF_METADATA),
    )  # fmt: skip
    meta = result.metadata()
    assert all(meta["modelspec." + option.removeprefix("metadata_")] == f"my {option}" for option in OF_METADATA)
    assert meta["ss_network_module"] == "networks.lora" and meta["ss_training_comment"] == "hello"
    assert meta["ss_network_dim"] == "4", "trap 2.11: not None"
    assert json.loads(meta["ss_network_args"]) == {"conv_dim": "2"}
    assert meta["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.1)"
    assert meta["ss_resolution"] == "(64, 64)" and meta["ss_num_train_images"] == "4"
    assert meta["ss_base_model_version"] == "sd_v1" and meta["ss_v2"] == "False"
    assert meta["modelspec.implementation_version"] == f"sd-lora-suite/{__version__}"
    assert (
        meta["ss_sd_model_name"] == base_model.name
        and len(meta["ss_new_sd_model_hash"]) == 64
        and len(meta["ss_sd_model_hash"]) == 8
    )
    assert json.loads(meta["ss_dataset_dirs"]) == {images.name: {"n_repeats": 1, "img_count": 4}}
    assert json.loads(meta["ss_tag_frequency"])[images.name]["a red square"] == 1
    assert len(meta["sshs_model_hash"]) == 64 and len(meta["sshs_legacy_hash"]) == 8


@pytest.mark.option("no_metadata")
def test_trap_5_19_no_metadata_leaves_what_loaders_need(run):
    meta = run("--max_train_steps=1", "--no_metadata", "--network_train_unet_only").metadata()
    wanted = {
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_v2",
        "ss_base_model_version",
        "sshs_model_hash",
        "sshs_legacy_hash",
    }
    assert set(meta) == wanted


@pytest.mark.option("dataset_config")
def test_trap_5_20_metadata_with_a_dataset_file(run, images, tmp_path):
    config = tmp_path / "data.toml"
    config.write_text(
        "[[datasets]]\nresolution = [96, 64]\n"
        f"[[datasets.subsets]]\nimage_dir = '{images}'\ncaption_extension = '.txt'\nnum_repeats = 2\n",
        encoding="utf-8",
    )
    meta = run("--max_train_steps=1", data=f"--dataset_config={config}").metadata()
    (dataset,) = json.loads(meta["ss_datasets"])
    assert dataset["resolution"] == [96, 64] and dataset["num_train_images"] == 8
    assert dataset["subsets"][0]["num_repeats"] == 2 and "ss_resolution" not in meta
    assert meta["modelspec.resolution"] == "96x64", "trap 5.20: from the datasets, not 512x512 or the command line's"
    assert meta["modelspec.architecture"] == "stable-diffusion-v1/lora" and meta["modelspec.prediction_type"] == "epsilon"
    assert meta["modelspec.title"] == "mine" and meta["modelspec.sai_model_spec"] == "1.0.1"


@pytest.mark.option("sample_prompts", "sample_every_n_epochs", "sample_at_first")
def test_sample_images(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# a comment\na cat --d 7 --s 2 --ss euler_a\n\na dog --w 96 --h 64 --s 2\n", encoding="utf-8")
    result = run(
        "--max_train_epochs=2",
        f"--sample_prompts={prompts}",
        "--sample_every_n_epochs=2",
        "--sample_at_first",
        "--sample_sampler=ddim",
    )
    names = sorted(path.name for path in (result.folder / "sample").iterdir())
    starts = ["mine_e000000_00_", "mine_e000000_01_", "mine_e000002_00_", "mine_e000002_01_"]
    assert [name[:16] for name in names] == starts and names[0].endswith("_7.png")
    sizes = [Image.open(result.folder / "sample" / name).size for name in names]
    assert sizes == [(64, 64), (96, 64)] * 2


def test_trap_5_13_sampling_every_0_steps_is_off(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n", encoding="utf-8")
    result = run("--max_train_steps=1", f"--sample_prompts={prompts}", "--sample_every_n_steps=0", "--sample_every_n_epochs=0")
    assert not (result.folder / "sample").exists()


@pytest.mark.option("logging_dir", "log_prefix")
def test_trap_5_4_every_rate_is_logged_once_under_its_name(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    run("--max_train_epochs=2", f"--logging_dir={logs}", "--log_prefix=try_", "--text_encoder_lr=5e-4")
    (folder,) = logs.iterdir()
    assert folder.name.startswith("try_")
    events = EventAccumulator(str(folder / "network_train"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss/current", "loss/average", "loss/epoch_average", "lr/unet", "lr/textencoder"}
    assert [event.value for event in events.Scalars("lr/textencoder")] == pytest.approx([5e-4] * 8)
    assert [event.step for event in events.Scalars("loss/epoch_average")] == [1, 2]


@pytest.mark.option("debug_dataset")
def test_debug_dataset_writes_a_sheet_and_a_page_and_stops(run, images, capsys):
    result = run("--debug_dataset", "--pretrained_model_name_or_path=/no/model")
    told = capsys.readouterr().out
    assert all(str(result.folder / name) in told for name in ("debug_dataset.png", "debug_dataset.html"))
    assert result.code == 0 and result.files() == ["debug_dataset-page", "debug_dataset.html", "debug_dataset.png"]
    assert len(list((result.folder / "debug_dataset-page").iterdir())) == len(list(images.glob("*.png")))


# ---------------------------------------------------------------- real loaders


@pytest.mark.parametrize("words", [[], ["--network_args", "conv_dim=2", "conv_alpha=1"]], ids=["LierLa", "C3Lier"])
def test_diffusers_loads_every_key_and_draws_the_same(run, base_model, words):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from networks.lora import create_network_from_weights

    result = run("--max_train_steps=3", "--learning_rate=1e-1", *words)
    file = result.folder / "mine.safetensors"
    images = []
    for ours in (False, True):
        model = load_stable_diffusion(str(base_model))
        pipe = StableDiffusionPipeline(
            model.vae,
            model.text_encoders[0],
            model.tokenizers[0],
            model.denoiser,
            DDIMScheduler(),
            None,
            None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        if ours:
            network, weights = create_network_from_weights(1.0, file, model.vae, model.text_encoders[0], model.denoiser)
            network.apply_to(model.text_encoders[0], model.denoiser)
            network.load_state_dict(weights)
        else:
            pipe.load_lora_weights(str(file))
            adapters = [
                n for part in (pipe.unet, pipe.text_encoder) for n, _ in part.named_modules() if n.endswith("lora_A.default_0")
            ]
            assert len(adapters) == len([k for k in load_file(file) if k.endswith("lora_down.weight")])
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        images.append(
            pipe("a red square", latents=noise, num_inference_steps=3, height=64, width=64, output_type="latent").images
        )
    torch.testing.assert_close(images[0], images[1], rtol=1e-3, atol=1e-3)
