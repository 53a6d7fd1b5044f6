"""An option is declared once: a made-up one shows wherever its properties say."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import create_model

from library.command_line import build_parser, option_fields, parse
from library.data.cache import reject_augmentations
from library.data.captions import caption_is_fixed, possible_captions
from library.data.config_keys import DatasetConfig, SubsetConfig, without
from library.data.holdout import without_augmentation
from library.errors import UserError
from library.option_traits import option, traits_of
from library.training.checks.idle_options import declared
from library.training.options import LossOptions, TrainNetworkOptions
from library.training.outputs.config_output import options_as_toml
from library.training.outputs.from_metadata import recorded_dataset_keys, recorded_keys, recorded_options
from library.training.outputs.metadata import other_options, recorded
from library.training.outputs.trackers import logged_options
from library.training.run_state.compatible import option_values


class MadeUpLoss(LossOptions):
    """Noise and loss"""

    shine: float | None = option(None, ge=0, help="strength of the shine", record="ss_shine")
    shine_steps: int = option(0, help="steps of it", needs=("shine",))
    shine_kind: str = option("soft", help="kind of it", only_with=("loss_type", ("huber",)))
    shine_file: str | None = option(None, help="file of it", path=True, resume="file name")
    shine_speed: int = option(
        1, help="how fast", resume="free", needs=(("shine_steps", "shine_word"), ("shine",)), unless=("shine_file",)
    )
    shine_word: str | None = option(None, help="password of it", secret=True)


MadeUp = create_model("MadeUp", __base__=TrainNetworkOptions, loss=(MadeUpLoss, ...))
ALL = ["--shine=0.5", "--shine_steps=4", "--shine_kind=hard", "--shine_file=a/b", "--shine_speed=2", "--shine_word=open"]


def made_up(*words: str, config: Path | None = None):
    return parse(MadeUp, [*words, *([f"--config_file={config}"] if config else [])], "")


def test_it_is_in_the_help_and_in_a_config_file(tmp_path):
    assert "strength of the shine" in build_parser(MadeUp, "").format_help()
    (tmp_path / "c.toml").write_text("shine = 0.25\n", encoding="utf-8")
    assert made_up(config=tmp_path / "c.toml").loss.shine == 0.25
    with pytest.raises(UserError, match="'shine' in .*: expected greater than or equal to 0"):
        (tmp_path / "c.toml").write_text("shine = -1\n", encoding="utf-8")
        made_up(config=tmp_path / "c.toml")
    written = options_as_toml(made_up(*ALL))
    assert "shine = 0.5" in written and 'shine_file = "a/b"' in written and "open" not in written


def test_it_is_in_the_metadata_and_read_from_there():
    options = made_up(*ALL)
    assert recorded(options, "ss_")["ss_shine"] == 0.5
    assert {name: value for name, value in other_options(options).items() if "shine" in name} == {
        "shine_steps": 4, "shine_kind": "hard", "shine_speed": 2
    }, "neither what has a key of its own, nor paths, nor secrets"  # fmt: skip
    assert recorded_keys(MadeUp)["ss_shine"] == "shine" and "shine_steps" not in recorded_keys(MadeUp).values()
    defaults = {name: field.get_default() for name, field in option_fields(MadeUp).items()}
    found = recorded_options({"ss_shine": "0.5", "ss_other_options": '{"shine_steps": 4}'}, defaults, MadeUp)
    assert found["shine"] == "0.5" and found["shine_steps"] == 4


def test_a_resumed_run_and_the_logs_follow_its_declaration():
    compared = {name: value for name, value in option_values(made_up(*ALL)).items() if "shine" in name}
    assert compared == {"shine": 0.5, "shine_steps": 4, "shine_kind": "hard", "shine_file": "b", "shine_word": "open"}
    logged = {name: value for name, value in logged_options(made_up(*ALL)).items() if "shine" in name}
    assert logged == {"shine": 0.5, "shine_steps": 4, "shine_kind": "hard", "shine_speed": 2}


def test_what_it_needs_is_reported():
    def idle(*words: str) -> dict[str, str]:
        return dict(declared(made_up(*words), [], [word[2:].partition("=")[0] for word in words]))

    assert idle("--shine_steps=4") == {"shine_steps": "needs --shine"}
    assert idle("--shine_kind=hard") == {"shine_kind": "for --loss_type=huber"}
    assert idle("--shine_steps=4", "--shine=1", "--shine_kind=hard", "--loss_type=huber") == {}
    assert idle("--shine_speed=2") == {"shine_speed": "needs --shine_steps or --shine_word"}
    assert idle("--shine_speed=2", "--shine_steps=4") == {"shine_speed": "needs --shine", "shine_steps": "needs --shine"}
    assert idle("--shine_speed=2", "--shine_steps=4", "--shine=1", "--shine_file=a") == {"shine_speed": "--shine_file wins"}


class MadeUpSubset(SubsetConfig):
    """A subset with keys of its own."""

    word_swap: bool = option(False, varies="caption")
    silence: float = option(0.0, varies="dropout")
    tint: float = option(0.0, varies="pixels", record="ss_tint")


def subset(**values) -> MadeUpSubset:
    return MadeUpSubset(image_dir=Path("images"), **values)


def test_a_key_that_changes_captions_is_not_cached_and_not_held_out():
    assert caption_is_fixed(subset()) and possible_captions("a, b", subset()) == ("a, b",)
    assert not caption_is_fixed(subset(word_swap=True)) and possible_captions("a, b", subset(word_swap=True)) is None
    assert possible_captions("a, b", subset(silence=0.5)) == ("a, b", "")
    assert without_augmentation(subset(word_swap=True, silence=0.5, tint=0.5)) == subset()
    assert without(subset(word_swap=True, silence=0.5), "dropout") == subset(word_swap=True)


def test_a_key_that_changes_images_is_refused_by_the_cache_and_recorded():
    reject_augmentations(SimpleNamespace(subsets=[SimpleNamespace(config=subset(flip_aug=True))]))
    with pytest.raises(UserError, match="tint of the subset images changes"):
        reject_augmentations(SimpleNamespace(subsets=[SimpleNamespace(config=subset(tint=0.5))]))
    assert recorded_dataset_keys(MadeUpSubset)["ss_tint"] == "tint"


@pytest.mark.parametrize("key", ["shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate", "token_warmup_step"])
def test_keys_that_make_captions_vary_are_declared_so(key):
    assert traits_of(SubsetConfig.model_fields[key]).varies == "caption"


def test_every_option_that_another_names_exists():
    for fields in (option_fields(TrainNetworkOptions), SubsetConfig.model_fields, DatasetConfig.model_fields):
        for field in fields.values():
            traits = traits_of(field)
            named = {*itertools.chain(*traits.needs), *traits.unless, traits.only_with and traits.only_with[0]} - {None}
            assert named <= fields.keys()


def test_every_secret_and_every_path_is_declared():
    fields = option_fields(TrainNetworkOptions)
    assert {name for name, field in fields.items() if traits_of(field).secret} == {"huggingface_token", "wandb_api_key"}
    ends = ("_dir", "_path", "_file", "_weights", "_prompts", "_json")
    unmarked = {name for name, field in fields.items() if name.endswith(ends) and not traits_of(field).path}
    assert unmarked == set(), "an option that names a file says path=True"


def test_a_held_out_image_keeps_its_wildcards():
    held = without_augmentation(SubsetConfig(image_dir=Path("images"), enable_wildcard=True, shuffle_caption=True, is_reg=True))
    assert held.enable_wildcard and not held.shuffle_caption and not held.is_reg
