"""Options: types, config file, unknown and refused names."""

from __future__ import annotations

import csv
import re
import unicodedata
from pathlib import Path

import pytest

from library.command_line import is_flag, option_fields, option_names
from library.errors import UserError
from library.generation.options import GenerateOptions
from library.option_traits import traits_of
from library.training.checks.unsupported_options import UNSUPPORTED
from library.training.options import TrainNetworkOptions, parse_options
from library.training.outputs.config_output import write_config

NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]
OPTIONS_CSV = Path(__file__).parents[1] / "data" / "options-train_network.csv"


def rows() -> list[dict[str, str]]:
    with open(OPTIONS_CSV, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["option"])
def test_every_option_of_the_reference_is_either_built_or_refused_by_name(row):
    name = row["option"][2:]
    built, refused = name in option_names(TrainNetworkOptions), name in UNSUPPORTED.reasons
    assert built != refused
    if refused:
        with pytest.raises(UserError, match=name):
            parse_options([*NEEDED, f"--{name}", "1"])


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["option"])
def test_defaults_are_those_of_the_reference(row):
    name = row["option"][2:]
    groups = option_names(TrainNetworkOptions)
    if name not in groups:
        return
    default = getattr(getattr(parse_options(NEEDED), groups[name]), name)
    wanted = row["default"]
    given = {"pretrained_model_name_or_path": "m", "train_data_dir": "d", "output_dir": "o", "network_module": "networks.lora"}
    if name in given:
        wanted = given[name]
    if wanted in ("None", "(empty string)"):
        assert default in (None, "")
    elif wanted in ("True", "False"):
        assert default is (wanted == "True")
    elif isinstance(default, (int, float)):
        assert default == float(wanted)
    else:
        assert default == wanted.strip('"')


def test_words_become_typed_values():
    options = parse_options(
        [*NEEDED, "--learning_rate", "1e-4", "--network_args", "a=1", "b=2", "--cache_latents", "--resolution=512,768"]
    )
    assert options.optimizer.learning_rate == 1e-4
    assert options.network.network_args == ["a=1", "b=2"]
    assert options.augmentation.cache_latents is True
    assert options.data.resolution == "512,768"


def test_negative_numbers_in_any_notation_are_values():
    signs = ["-.5", "-5e-1", "\u22120.5", "\u2013.5"]  # the last two are what web pages and word processors write
    for words in (["--base_weights_multiplier", *signs], [f"--base_weights_multiplier={signs[2]}"]):
        options = parse_options([*NEEDED, "--base_weights", *["a.safetensors"] * 4, *words])
        assert set(options.network.base_weights_multiplier) == {-0.5}


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--netwrk_dim", "4"], ["--netwrk_dim", "--network_dim"]),
        (["--network_dim", "four"], ["--network_dim", "four"]),
        (["--save_model_as", "bin"], ["--save_model_as", "safetensors"]),
        (["--learning_rate", "-1"], ["--learning_rate"]),
        (["--lr_warmup_steps", "1.5"], ["--lr_warmup_steps", "1.5"]),
        (["--lr_warmup_steps", "inf"], ["--lr_warmup_steps"]),
        (["--network_alpha", "inf"], ["--network_alpha"]),
        (["--network_dim"], ["--network_dim", "expected one argument"]),
        (["stray word"], ["stray word"]),
        (["--config_file=missing"], ["missing"]),
    ],
)
def test_wrong_input_is_one_line_that_names_the_option(words, parts):
    with pytest.raises(UserError) as caught:
        parse_options([*NEEDED, *words])
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_trap_5_12_cpu_offload_checkpointing_is_refused_with_what_to_use():
    with pytest.raises(UserError, match="^--cpu_offload_checkpointing is not supported: .*use --gradient_checkpointing"):
        parse_options(["--cpu_offload_checkpointing"])


def test_trap_5_16_options_are_not_abbreviated():
    with pytest.raises(UserError, match="network_alpha"):
        parse_options([*NEEDED, "--network_al=8"])


def test_all_wrong_names_and_values_are_reported_at_once(tmp_path):
    file = config(tmp_path, 'lerning_rate = 1\nflip_aug = "yes"\nzero_stage = 3\nnetwork_dim = "four"')
    with pytest.raises(UserError) as caught:
        parse_options([*NEEDED, file, "--netwrk_alpha", "4", "--deepspeed", "--clip_skip=0"])
    starts = [
        "unknown option '--netwrk_alpha'",
        "--deepspeed is not supported",
        "unknown option 'lerning_rate'",
        "'flip_aug' in",
        "'zero_stage' in",
    ]
    starts += ["--clip_skip: expected", "'network_dim' in"]
    assert [problem.startswith(start) for problem, start in zip(caught.value.problems, starts, strict=True)] == [True] * 7, (
        caught.value.problems
    )


@pytest.mark.parametrize("text, wanted", [("100", 100), ("0.1", 0.1), ("10%", 0.1), ("1e3", 1000), ("0", 0)])
def test_trap_5_10_steps_may_be_a_number_a_share_or_a_percentage(text, wanted):
    assert parse_options([*NEEDED, "--lr_warmup_steps", text]).optimizer.lr_warmup_steps == pytest.approx(wanted)


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return f"--config_file={path}"


def test_config_file_is_flattened_and_the_command_line_wins(tmp_path):
    file = config(
        tmp_path, '[model]\npretrained_model_name_or_path = "m"\n[any]\nmax_train_steps = 7\nnetwork_dim = 8\nresolution = 64\n'
    )
    options = parse_options([file, *NEEDED[1:], "--network_dim=16"])
    assert options.training.max_train_steps == 7 and options.network.network_dim == 16 and options.data.resolution == "64"


def test_config_file_may_be_named_without_its_suffix(tmp_path):
    file = config(tmp_path, "max_train_steps = 7\n").removesuffix(".toml")
    assert parse_options([file, *NEEDED]).training.max_train_steps == 7


@pytest.mark.parametrize(
    "text, part",
    [
        ("max_train_stps = 7", "max_train_steps"),
        ('max_train_steps = "many"', "max_train_steps"),
        ("cache_info = true", "cache_info"),
        ("= 3", "run.toml"),
        ("network_dim = true", "network_dim"),
        ("flip_aug = 2", "true or false"),
        ('flip_aug = "yes"', "true or false"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "twice"),
        ('config_file = "other.toml"', "config_file"),
    ],
)
def test_trap_5_17_config_file_is_checked(tmp_path, text, part):
    with pytest.raises(UserError, match=part):
        parse_options([config(tmp_path, text), *NEEDED])


def test_trap_5_17_a_number_written_as_text_is_a_number(tmp_path):
    assert parse_options([config(tmp_path, 'learning_rate = "1e-4"'), *NEEDED]).optimizer.learning_rate == 1e-4


def test_config_file_of_a_graphical_front_end_with_refused_options_at_their_defaults(tmp_path):
    file = config(
        tmp_path, 'masked_loss = false\nloss_type = "l2"\nhuber_c = 0.1\nmultires_noise_iterations = 0\nnetwork_args = []\n'
    )
    assert parse_options([file, *NEEDED]).network.network_args == []


# Keys and values as the best-known front end writes them into a file.
FRONT_END = """
adaptive_noise_scale = 0
bucket_no_upscale = true
bucket_reso_steps = 64
cache_latents = true
caption_dropout_every_n_epochs = 0
caption_dropout_rate = 0
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 20
gradient_accumulation_steps = 1
huber_c = 0.1
huber_scale = 1
huber_schedule = "snr"
huggingface_path_in_repo = ""
huggingface_repo_id = ""
huggingface_repo_type = ""
huggingface_repo_visibility = ""
huggingface_token = ""
ip_noise_gamma = 0
keep_tokens = 0
learning_rate = 0.0001
log_with = ""
loss_type = "l2"
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_scheduler_type = ""
lr_warmup_steps = 0.1
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_epochs = 0
max_train_steps = 1600
min_bucket_reso = 256
min_snr_gamma = 0
mixed_precision = "fp16"
multires_noise_discount = 0.3
multires_noise_iterations = 0
network_alpha = 16
network_args = []
network_dim = 32
network_dropout = 0
network_module = "networks.lora"
no_half_vae = false
noise_offset = 0.05
noise_offset_type = "Original"
optimizer_args = []
optimizer_type = "AdamW8bit"
output_dir = "out"
output_name = "last"
persistent_data_loader_workers = 1
pretrained_model_name_or_path = "model.safetensors"
prior_loss_weight = 1
resolution = "512,512"
resume = ""
sample_every_n_epochs = 0
sample_every_n_steps = 0
sample_prompts = ""
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_every_n_steps = 0
save_last_n_epochs = 0
save_last_n_steps = 0
save_model_as = "safetensors"
save_precision = "fp16"
scale_weight_norms = 0
text_encoder_lr = []
train_batch_size = 1
train_data_dir = "images"
training_comment = ""
unet_lr = 0.0001
v_pred_like_loss = 0
vae = ""
vae_batch_size = 1
wandb_api_key = ""
wandb_run_name = ""
xformers = true
"""


def test_a_file_of_a_graphical_front_end_runs_as_it_is(tmp_path):
    options = parse_options([config(tmp_path, FRONT_END)])
    assert options.model.vae is None and options.captions.max_token_length is None and options.optimizer.text_encoder_lr is None
    assert options.training.max_train_epochs is None and options.output.save_every_n_steps is None
    assert options.augmentation.persistent_data_loader_workers is True and options.loss.noise_offset == 0.05


@pytest.mark.option("config_file")
def test_output_config_writes_what_config_file_reads(tmp_path):
    words = [
        "--network_dim=8",
        "--learning_rate=1e-4",
        "--flip_aug",
        "--network_args",
        "conv_dim=4",
        'name="a\\b"',
        "--lr_warmup_steps=10%",
    ]
    words += [
        "--base_weights",
        "a.safetensors",
        "--base_weights_multiplier",
        "0.5",
        "--caption_prefix=ein Bär,\x7f",
        "--resolution=64,96",
    ]
    target = tmp_path / "new"
    options = parse_options([*NEEDED, *words, "--output_config", f"--config_file={target}"])
    path = write_config(options, options.logs.config_file)
    assert (
        path == tmp_path / "new.toml"
        and "config_file" not in path.read_text("utf-8")
        and "max_train_steps" not in path.read_text("utf-8")
    )
    again = parse_options([f"--config_file={target}"]).model_dump()
    wanted = options.model_dump()
    for dumped in (again, wanted):
        dumped["logs"] |= {"config_file": None, "output_config": False}
    assert again == wanted
    with pytest.raises(UserError, match="is there already"):
        write_config(options, options.logs.config_file)
    with pytest.raises(UserError, match="--output_config needs --config_file"):
        write_config(options, None)


@pytest.mark.option("output_config")
def test_the_trainer_writes_its_config_and_stops(tmp_path, monkeypatch, capsys):
    import train_network

    monkeypatch.setattr("sys.argv", ["train_network.py", *NEEDED, "--output_config", f"--config_file={tmp_path / 'x.toml'}"])
    assert train_network.main() == 0 and (tmp_path / "x.toml").is_file()
    assert "x.toml" in capsys.readouterr().out


def test_text_encoder_lr_is_one_rate_or_one_for_each_encoder():
    assert parse_options([*NEEDED, "--text_encoder_lr=1e-5"]).optimizer.text_encoder_lr == 1e-5
    assert parse_options([*NEEDED, "--text_encoder_lr", "1e-5", "2e-5"]).optimizer.text_encoder_lr == [1e-5, 2e-5]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("text_encoder_lr = [5e-5, 1e-5]", [5e-5, 1e-5]),
        ("text_encoder_lr = [0.00005]", 5e-5),
        ("text_encoder_lr = 5e-5", 5e-5),
        ('text_encoder_lr = ["5e-5", "1e-5"]', [5e-5, 1e-5]),
    ],
)
def test_rates_of_text_encoders_in_a_config_file_of_any_program(tmp_path, line, expected):
    options = parse_options([config(tmp_path, FRONT_END.replace("text_encoder_lr = []", line))])
    assert options.optimizer.text_encoder_lr == expected


# Options for paths


def paths_of(options_class) -> dict:
    return {name: field for name, field in option_fields(options_class).items() if traits_of(field).path and not is_flag(field)}


@pytest.mark.parametrize("options_class", [TrainNetworkOptions, GenerateOptions])
def test_every_option_that_is_named_after_a_file_or_folder_is_declared_as_a_path(options_class):
    named = re.compile(
        "ckpt|vae|resume|sample_prompts|outdir|metadata_thumbnail|.*(_dir|_path|_file|_weights|_embeddings|_json|_config)"
    )
    found = {name for name, field in option_fields(options_class).items() if named.fullmatch(name) and not is_flag(field)}
    assert {*paths_of(options_class)} == found and len(found) > 8


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize("name", paths_of(TrainNetworkOptions))
def test_an_empty_path_is_an_option_that_is_not_given(name, empty, tmp_path):
    for words in ([f"--{name}", empty], [config(tmp_path, f'{name} = "{empty}"')]):
        if name == "config_file" and words[0] != "--config_file":
            continue  # a file cannot name another file
        options = parse_options([*(word for word in NEEDED if not word.startswith(f"--{name}=")), *words])
        assert getattr(getattr(options, option_names(TrainNetworkOptions)[name]), name) is None


def test_an_empty_path_on_the_command_line_also_takes_back_that_of_the_config_file(tmp_path):
    file = config(tmp_path, 'vae = "v"\nbase_weights = ["a", "b"]\n')
    options = parse_options([*NEEDED, file, "--vae=", "--base_weights", ""])
    assert options.model.vae is None and options.network.base_weights is None
    with pytest.raises(UserError, match="--base_weights: one of its paths is empty; take it out"):
        parse_options([*NEEDED, "--base_weights", "a", ""])


def test_files_are_found_in_either_form_of_an_accent(tmp_path):
    composed, decomposed = (str(tmp_path / unicodedata.normalize(form, "caf\u00e9")) for form in ("NFC", "NFD"))
    Path(f"{decomposed}.toml").write_text(f'vae = "{composed}.pt"\nbase_weights = ["{composed}.pt", "x"]\n', encoding="utf-8")
    Path(f"{decomposed}.pt").touch()
    for name in (f"{composed}.toml", composed):
        options = parse_options(
            [*NEEDED, f"--config_file={name}", f"--network_weights={composed}.pt", f"--output_dir={composed}"]
        )
        found = [options.model.vae, options.network.network_weights, *options.network.base_weights]
        assert [Path(path).exists() for path in found] == [True, True, True, False]
        assert options.output.output_dir == composed


def test_a_wave_is_the_home_folder_which_shells_leave_in_place_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    options = parse_options([*NEEDED, "--output_dir=~/out", "--base_weights", "~", "a~b", "./~"])
    (tmp_path / "run.toml").write_text("max_train_steps = 7\n", encoding="utf-8")
    assert parse_options([*NEEDED, "--config_file=~/run"]).training.max_train_steps == 7
    assert options.output.output_dir == f"{tmp_path}/out" and options.network.base_weights == [str(tmp_path), "a~b", "./~"]
