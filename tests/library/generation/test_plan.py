"""library/generation/plan.py, prompt_sources.py and seeds.py: from prompts to the list of images."""

from __future__ import annotations

import io
import re
from random import Random

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.errors import UserError
from library.generation.options import parse_options
from library.generation.plan import Planner
from library.generation.prompt_sources import RawPrompt, read_prompts
from library.generation.seeds import Seeds


def planner(*words: str) -> Planner:
    return Planner(parse_options(["--ckpt=m", "--prompt=a", *words]))


def lines(*texts: str) -> list[RawPrompt]:
    return [RawPrompt(text, f"line {number}") for number, text in enumerate(texts, start=1)]


def seeds(requests) -> list[int]:
    return [request.seed for request in requests]


def drawn(seed: int, count: int) -> list[int]:
    """As Python's generator draws them."""
    random = Random(seed)
    return [random.randint(0, 2**31 - 1) for _ in range(count)]


# ---------------------------------------------------------------- seeds


def test_one_seed_and_one_image():
    assert seeds(planner("--seed=5").plan(lines("a"))) == [5]


def test_trap_6_2_seeds_are_handed_out_from_the_front():
    made = planner("--seed=5", "--images_per_prompt=2", "--n_iter=2").plan(lines("a", "b"))
    assert seeds(made) == drawn(5, 8)
    assert [request.line.values["prompt"] for request in made] == list("aabbaabb")
    listed = planner("--seed=1,2,3", "--images_per_prompt=2").plan(lines("a", "b"))
    assert seeds(listed) == [1, 2, 3, 1]


def test_trap_6_2_a_seed_in_an_interactive_run_goes_on_from_prompt_to_prompt():
    asking = planner("--interactive", "--seed=5", "--n_iter=3")
    assert asking.plan([]) == []  # no list before the asking
    assert seeds(asking.plan(lines("a"))) + seeds(asking.plan(lines("b"))) == drawn(5, 2)
    same = planner("--interactive", "--seed=5,6", "--iter_same_seed", "--images_per_prompt=2")
    assert [seeds(same.plan(prompts)) for prompts in ([], lines("a"), lines("b"))] == [[], [5, 5], [6, 6]]


def test_without_a_seed_every_image_has_another():
    made = seeds(planner("--images_per_prompt=20").plan(lines("a")))
    assert len(set(made)) == 20 and all(0 <= seed < 2**31 for seed in made)


def test_iter_same_seed():
    made = seeds(planner("--iter_same_seed", "--n_iter=2").plan(lines("a", "b", "c")))
    assert made[0] == made[1] == made[2] != made[3] == made[4] == made[5]
    assert seeds(planner("--iter_same_seed", "--seed=9").plan(lines("a", "b"))) == [9, 9]
    assert seeds(planner("--iter_same_seed", "--seed=1,2", "--n_iter=2").plan(lines("a", "b"))) == [1, 1, 2, 2]


def test_a_line_with_seeds_of_its_own_takes_none_from_the_list():
    made = planner("--seed=1,2", "--images_per_prompt=2").plan(lines("a --d 7", "b --d 8,9,10", "c"))
    assert seeds(made) == [7, 7, 8, 9, 1, 2]


def test_seeds_that_no_image_gets_are_named():
    plan = planner("--seed=1,2,3")
    plan.plan(lines("a --d 4,5"))
    assert plan.notes == [
        "line 1: --d has more seeds than images; not used: 5 (see --images_per_prompt)",
        "--seed has more seeds than there are images; not used: 1, 2, 3",
    ]


def test_more_variants_do_not_change_seeds_and_a_seed_repeats_the_choices():
    words = ("--seed=5", "--images_per_prompt=8")
    with_choice = planner(*words).plan(lines("{a|b|c}"))
    assert seeds(with_choice) == seeds(planner(*words).plan(lines("a"))) == drawn(5, 8)
    again = planner(*words).plan(lines("{a|b|c}"))
    assert [request.line for request in again] == [request.line for request in with_choice]


def test_seeds_of_a_sheet_are_the_same_for_every_prompt():
    made = planner("--sheet", "--seed=1,2").plan(lines("a", "b --d 7", "{e$$c|d}"))
    assert [(request.line.values["prompt"], request.seed) for request in made] == [
        ("a", 1), ("a", 2), ("b", 7), ("b", 7), ("c", 1), ("c", 2), ("d", 1), ("d", 2),
    ]  # fmt: skip
    assert seeds(planner("--sheet", "--seed=5", "--images_per_prompt=2").plan(lines("a", "b"))) == drawn(5, 2) * 2
    assert seeds(planner("--sheet", "--seed=5").plan(lines("a", "b"))) == [5, 5]


def test_random_seeds_are_short():
    assert all(seed < 2**31 for seed in Seeds(None).take(50))


# ---------------------------------------------------------------- order, repeats, mistakes


def test_shuffle_prompts_draws_each_prompt_once_a_pass_in_another_order():
    made = planner("--shuffle_prompts", "--seed=3", "--n_iter=2").plan(lines(*"abcdefgh"))
    first, second = ("".join(request.line.values["prompt"] for request in made[start : start + 8]) for start in (0, 8))
    assert sorted(first) == sorted(second) == list("abcdefgh") and len({first, second, "abcdefgh"}) == 3


def test_a_wrong_line_is_named_once_with_its_column_and_the_others_are_made():
    plan = planner("--n_iter=2")
    made = plan.plan(lines("a", "b --w 65", "c {x|y} --q 1"))
    assert [request.line.values["prompt"] for request in made] == ["a", "a"]
    assert list(plan.problems) == ["line 2", "line 3"]
    assert "line 2, column 3: option --w" in plan.problems["line 2"]
    assert "line 3, column 9" in plan.problems["line 3"]  # as it was written, not as it reads without braces


def test_am_with_merged_networks_does_nothing_and_says_so():
    plan = planner("--network_weights", "a", "--network_merge")
    assert plan.plan(lines("a --am 2"))[0].line.values == {"prompt": "a"}
    assert plan.notes == ["line 1: --am does nothing, as --network_merge made the networks part of the model"]


# ---------------------------------------------------------------- sources


def test_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# a comment\n a cat --s 3\n\n  # another\nein Kätzchen\n", encoding="utf-8")
    found = read_prompts(parse_options(["--ckpt=m", f"--from_file={path}"]), [])
    assert [(prompt.text.strip(), prompt.where) for prompt in found] == [
        ("a cat --s 3", f"{path}, line 2"), ("ein Kätzchen", f"{path}, line 5"),
    ]  # fmt: skip


def test_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n#b\nc"))
    found = read_prompts(parse_options(["--ckpt=m", "--from_file=-"]), [])
    assert [(prompt.text, prompt.where) for prompt in found] == [("a", "standard input, line 1"), ("c", "standard input, line 3")]


def test_files_without_prompts_or_of_another_kind(tmp_path):
    for name, message in (("none.txt", "no such file"), ("empty.txt", "there is no prompt in it"), ("p.toml", "prompt a line")):
        path = tmp_path / name
        if name != "none.txt":
            path.write_text("# nothing\n", encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_prompts(parse_options(["--ckpt=m", f"--from_file={path}"]), [])


@pytest.fixture
def sources(tmp_path):
    for name in ("b.png", "a.png", "c.txt"):
        fields = PngInfo()
        fields.add_text("prompt", f"{name} {{x|y}} --w")
        fields.add_text("negative-prompt", "blurry")
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG", pnginfo=fields)
    return tmp_path


def test_images_are_used_in_turn_image_by_image(sources):
    made = planner(f"--image_path={sources}", "--images_per_prompt=3").plan(lines("a"))
    assert [request.source.name for request in made] == ["a.png", "b.png", "a.png"]


def test_prompts_are_read_from_the_images_if_there_are_no_others(sources):
    options = parse_options(["--ckpt=m", f"--image_path={sources}", "--images_per_prompt=2"])
    plan = Planner(options)
    made = plan.plan(read_prompts(options, plan.sources))
    assert [(request.line.values["prompt"], request.source.name) for request in made] == [
        ("a.png {x|y} --w", "a.png"), ("a.png {x|y} --w", "a.png"), ("b.png {x|y} --w", "b.png"), ("b.png {x|y} --w", "b.png"),
    ]  # fmt: skip
    assert made[0].line.values["negative_prompt"] == "blurry"


def test_masks_repaint_with_images_and_show_regions_with_networks(sources):
    repaint = planner(f"--image_path={sources}", f"--mask_path={sources}").plan(lines("a"))
    assert repaint[0].mask.name == "a.png"
    regions = planner(f"--image_path={sources}", f"--mask_path={sources}", "--network_weights", "n").plan(lines("a"))
    assert regions[0].mask is None


@pytest.mark.parametrize(("name", "message"), [("nothing", "there is no such file"), ("empty", "the folder holds no image")])
def test_images_that_are_not_there(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"--image_path .*{name}: {message}"):
        planner(f"--image_path={tmp_path / name}")


def test_an_image_without_a_prompt_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    options = parse_options(["--ckpt=m", f"--image_path={tmp_path}"])
    with pytest.raises(UserError, match="plain.png holds no prompt of this script; give --prompt or --from_file"):
        read_prompts(options, Planner(options).sources)


# ---------------------------------------------------------------- what does not go together is known before the model is loaded


@pytest.mark.parametrize(
    "words, text, message",
    [
        (["--scale=1", "--negative_scale=2"], "a", "line 1: a negative scale needs a scale above 1, as guidance is off at 1"),
        ([], "a --l 0.5 --nl 2", "line 1: a negative scale needs a scale above 1, as guidance is off at 0.5"),
        ([], "a <lora:ink:0.5>", "line 1: the prompt asks for <lora:ink>, .*add --lora_dir"),
        (["--lora_dir=FOLDER"], "a <lora:inc>", "line 1: unknown LoRA 'inc' in .*; did you mean 'ink'"),
        (["--network_weights", "a", "b", "--mask_path=MASK"], "a cat", "line 1: the prompt has 1 part.* for 2 networks"),
    ],
)
def test_lines_that_do_not_go_with_the_command_line(tmp_path, words, text, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "mask.png")
    (tmp_path / "ink.safetensors").touch()
    asked = planner(*[word.replace("MASK", str(tmp_path / "mask.png")).replace("FOLDER", str(tmp_path)) for word in words])
    good = "a AND b --l 7"
    assert len(asked.plan([*lines(text), RawPrompt(good, "line 2")])) == 1
    assert re.fullmatch(f"{message}.*", asked.problems["line 1"])


def test_deep_shrink_without_a_depth_is_refused():
    for word in ("--ds_ratio=0.4", "--ds_timesteps_1=500", "--ds_depth_2=1"):
        name = word.partition("=")[0]
        with pytest.raises(UserError, match=f"{name}: Deep Shrink does nothing without a depth; give --ds_depth_1"):
            planner(word).plan(lines("a", "b"))
        assert planner(word).plan(lines("a", "b --dsd1 2"))
    with pytest.raises(UserError, match="--ds_timesteps_2: .*give --ds_depth_2, or --dsd2 in a line"):
        planner("--ds_depth_1=2", "--ds_timesteps_2=300").plan(lines("a"))
