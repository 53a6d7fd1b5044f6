"""library/generation/request_builder.py, prompts/sources.py and prompts/seeds.py: from prompts to the list of images."""

from __future__ import annotations

import io
import re
import struct
import zlib
from random import Random

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.errors import UserError
from library.generation.extras.image_input import load_image, load_mask, source_size
from library.generation.extras.regional import Regions
from library.generation.options import parse_options
from library.generation.prompts.seeds import Seeds
from library.generation.prompts.sources import list_images, read_prompts
from library.generation.prompts.spec import DeepShrink, PromptSpec, SizeConditioning
from library.generation.prompts.written import WrittenPrompt
from library.generation.request_builder import RequestBuilder


def builder(*words: str) -> RequestBuilder:
    return RequestBuilder(parse_options(["--ckpt=m", "--prompt=a", *words]))


def lines(*texts: str) -> list[WrittenPrompt]:
    return [WrittenPrompt(text, f"line {number}") for number, text in enumerate(texts, start=1)]


def seeds(requests) -> list[int]:
    return [request.spec.seed for request in requests]


def drawn(seed: int, count: int) -> list[int]:
    """As Python's generator draws them."""
    random = Random(seed)
    return [random.randint(0, 2**31 - 1) for _ in range(count)]


# ---------------------------------------------------------------- seeds


def test_one_seed_and_one_image():
    assert seeds(builder("--seed=5").build(lines("a"))) == [5]


def test_trap_6_2_seeds_are_handed_out_from_the_front():
    made = builder("--seed=5", "--images_per_prompt=2", "--n_iter=2").build(lines("a", "b"))
    assert seeds(made) == drawn(5, 8)
    assert [request.spec.prompt for request in made] == list("aabbaabb")
    listed = builder("--seed=1,2,3", "--images_per_prompt=2").build(lines("a", "b"))
    assert seeds(listed) == [1, 2, 3, 1]


def test_trap_6_2_a_seed_in_an_interactive_run_goes_on_from_prompt_to_prompt():
    asking = builder("--interactive", "--seed=5", "--n_iter=3")
    assert asking.build([]) == []  # no list before the asking
    assert seeds(asking.build(lines("a"))) + seeds(asking.build(lines("b"))) == drawn(5, 2)
    same = builder("--interactive", "--seed=5,6", "--iter_same_seed", "--images_per_prompt=2")
    assert [seeds(same.build(prompts)) for prompts in ([], lines("a"), lines("b"))] == [[], [5, 5], [6, 6]]


def test_without_a_seed_every_image_has_another():
    made = seeds(builder("--images_per_prompt=20").build(lines("a")))
    assert len(set(made)) == 20 and all(0 <= seed < 2**31 for seed in made)


def test_iter_same_seed():
    made = seeds(builder("--iter_same_seed", "--n_iter=2").build(lines("a", "b", "c")))
    assert made[0] == made[1] == made[2] != made[3] == made[4] == made[5]
    assert seeds(builder("--iter_same_seed", "--seed=9").build(lines("a", "b"))) == [9, 9]
    assert seeds(builder("--iter_same_seed", "--seed=1,2", "--n_iter=2").build(lines("a", "b"))) == [1, 1, 2, 2]


def test_a_line_with_seeds_of_its_own_takes_none_from_the_list():
    made = builder("--seed=1,2", "--images_per_prompt=2").build(lines("a --d 7", "b --d 8,9,10", "c"))
    assert seeds(made) == [7, 7, 8, 9, 1, 2]


def test_seeds_that_no_image_gets_are_named():
    asked = builder("--seed=1,2,3")
    asked.build(lines("a --d 4,5"))
    assert asked.notes == [
        "line 1: --d has more seeds than images; not used: 5 (see --images_per_prompt)",
        "--seed has more seeds than there are images; not used: 1, 2, 3",
    ]


def test_more_variants_do_not_change_seeds_and_a_seed_repeats_the_choices():
    words = ("--seed=5", "--images_per_prompt=8")
    with_choice = builder(*words).build(lines("{a|b|c}"))
    assert seeds(with_choice) == seeds(builder(*words).build(lines("a"))) == drawn(5, 8)
    again = builder(*words).build(lines("{a|b|c}"))
    assert [request.spec for request in again] == [request.spec for request in with_choice]


def test_seeds_of_a_sheet_are_the_same_for_every_prompt():
    made = builder("--sheet", "--seed=1,2").build(lines("a", "b --d 7", "{e$$c|d}"))
    assert [(request.spec.prompt, request.spec.seed) for request in made] == [
        ("a", 1), ("a", 2), ("b", 7), ("b", 7), ("c", 1), ("c", 2), ("d", 1), ("d", 2),
    ]  # fmt: skip
    assert seeds(builder("--sheet", "--seed=5", "--images_per_prompt=2").build(lines("a", "b"))) == drawn(5, 2) * 2
    assert seeds(builder("--sheet", "--seed=5").build(lines("a", "b"))) == [5, 5]


def test_random_seeds_are_short():
    assert all(seed < 2**31 for seed in Seeds(None).take(50))


# ---------------------------------------------------------------- order, repeats, mistakes


def test_shuffle_prompts_draws_each_prompt_once_a_pass_in_another_order():
    made = builder("--shuffle_prompts", "--seed=3", "--n_iter=2").build(lines(*"abcdefgh"))
    first, second = ("".join(request.spec.prompt for request in made[start : start + 8]) for start in (0, 8))
    assert sorted(first) == sorted(second) == list("abcdefgh") and len({first, second, "abcdefgh"}) == 3


def test_a_wrong_line_is_named_once_with_its_column_and_the_others_are_made():
    asked = builder("--n_iter=2")
    made = asked.build(lines("a", "b --w 65", "c {x|y} --q 1"))
    assert [request.spec.prompt for request in made] == ["a", "a"]
    assert list(asked.problems) == ["line 2", "line 3"]
    assert "line 2, column 3: option --w" in asked.problems["line 2"]
    assert "line 3, column 9" in asked.problems["line 3"]  # as it was written, not as it reads without braces


def test_am_with_merged_networks_does_nothing_and_says_so():
    asked = builder("--network_weights", "a", "--network_merge")
    assert asked.build(lines("a --am 2"))[0].spec.multipliers is None
    assert asked.notes == ["line 1: --am does nothing, as --network_merge made the networks part of the model"]


# ---------------------------------------------------------------- sources


def test_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# a comment\n a cat --s 3\n\n  # another\nein Kätzchen\n", encoding="utf-8")
    found = read_prompts(parse_options(["--ckpt=m", f"--from_file={path}"]).prompts, [])
    assert [(prompt.text.strip(), prompt.where) for prompt in found] == [
        ("a cat --s 3", f"{path}, line 2"), ("ein Kätzchen", f"{path}, line 5"),
    ]  # fmt: skip


def test_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n#b\nc"))
    found = read_prompts(parse_options(["--ckpt=m", "--from_file=-"]).prompts, [])
    assert [(prompt.text, prompt.where) for prompt in found] == [("a", "standard input, line 1"), ("c", "standard input, line 3")]


def test_files_without_prompts_or_of_another_kind(tmp_path):
    for name, message in (("none.txt", "no such file"), ("empty.txt", "there is no prompt in it"), ("p.toml", "prompt a line")):
        path = tmp_path / name
        if name != "none.txt":
            path.write_text("# nothing\n", encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_prompts(parse_options(["--ckpt=m", f"--from_file={path}"]).prompts, [])


@pytest.fixture
def sources(tmp_path):
    for name in ("b.png", "a.png", "c.txt"):
        fields = PngInfo()
        fields.add_text("prompt", f"{name} {{x|y}} --w")
        fields.add_text("negative-prompt", "blurry")
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG", pnginfo=fields)
    return tmp_path


def test_images_are_used_in_turn_image_by_image(sources):
    made = builder(f"--image_path={sources}", "--images_per_prompt=3").build(lines("a"))
    assert [request.spec.image.name for request in made] == ["a.png", "b.png", "a.png"]


def test_prompts_are_read_from_the_images_if_there_are_no_others(sources):
    options = parse_options(["--ckpt=m", f"--image_path={sources}", "--images_per_prompt=2"])
    asked = RequestBuilder(options)
    made = asked.build(read_prompts(options.prompts, asked.sources))
    assert [(request.spec.prompt, request.spec.image.name) for request in made] == [
        ("a.png {x|y} --w", "a.png"), ("a.png {x|y} --w", "a.png"), ("b.png {x|y} --w", "b.png"), ("b.png {x|y} --w", "b.png"),
    ]  # fmt: skip
    assert made[0].spec.negative_prompt == "blurry"


def test_masks_repaint_with_images_unless_the_prompt_asks_for_regions(sources):
    repaint = builder(f"--image_path={sources}", f"--mask_path={sources}").build(lines("a"))
    assert repaint[0].spec.mask.name == "a.png"
    words = (f"--image_path={sources}", f"--mask_path={sources}", "--network_weights", "n")
    single, several = builder(*words).build(lines("a", "b AND c"))
    assert single.spec.mask.name == "a.png" and several.spec.mask is None
    assert builder(*words, "--network_regional_mask_max_color_codes=1").build(lines("a"))[0].spec.mask is None
    assert builder(*words, "--network_merge").build(lines("a AND b"))[0].spec.mask.name == "a.png"


@pytest.mark.parametrize(("name", "message"), [("nothing", "there is no such file"), ("empty", "the folder holds no image")])
def test_images_that_are_not_there(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"--image_path .*{name}: {message}"):
        builder(f"--image_path={tmp_path / name}")


def test_images_of_a_folder_are_those_that_training_reads_and_others_are_named(tmp_path, caplog):
    for name in ("a.bmp", "b.gif", "c.PNG"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "d.heic").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a caption", encoding="utf-8")
    assert [path.name for path in list_images(str(tmp_path), "--image_path")] == ["a.bmp", "b.gif", "c.PNG"]
    assert "images left out, since their kinds are not read: d.heic" in caplog.text


def test_an_image_without_a_prompt_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    options = parse_options(["--ckpt=m", f"--image_path={tmp_path}"])
    with pytest.raises(UserError, match="plain.png holds no prompt of this script; give --prompt or --from_file"):
        read_prompts(options.prompts, RequestBuilder(options).sources)


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
    asked = builder(*[word.replace("MASK", str(tmp_path / "mask.png")).replace("FOLDER", str(tmp_path)) for word in words])
    good = "a AND b --l 7"
    assert len(asked.build([*lines(text), WrittenPrompt(good, "line 2")])) == 1
    assert re.fullmatch(f"{message}.*", asked.problems["line 1"])


def test_deep_shrink_without_a_depth_is_refused():
    for word in ("--ds_ratio=0.4", "--ds_timesteps_1=500", "--ds_depth_2=1"):
        name = word.partition("=")[0]
        with pytest.raises(UserError, match=f"{name}: Deep Shrink does nothing without a depth; give --ds_depth_1"):
            builder(word).build(lines("a", "b"))
        assert builder(word).build(lines("a", "b --dsd1 2"))
    with pytest.raises(UserError, match="--ds_timesteps_2: .*give --ds_depth_2, or --dsd2 in a line"):
        builder("--ds_depth_1=2", "--ds_timesteps_2=300").build(lines("a"))


# ---------------------------------------------------------------- what a line sets


def test_what_a_line_leaves_open_is_as_on_the_command_line(sources):
    words = ("--W=64", "--H=128", "--scale=3", "--negative_scale=2", "--strength=0.4", f"--image_path={sources}", "--seed=1")
    made = builder(*words).build(lines("a --nl none --w 72"))[0].spec
    assert made == PromptSpec(
        "a", width=72, height=128, scale=3.0, steps=50, strength=0.4, image=sources / "a.png", seed=1, negative_scale=None
    )


def test_trap_6_12_deep_shrink_holds_for_its_own_line_alone():
    shrunk, plain = builder().build(lines("a --dsd1 2 --dst1 700 --dsr 0.25", "b"))
    assert shrunk.spec.deep_shrink == DeepShrink(2, 700, None, 650, 0.25) and plain.spec.deep_shrink is None
    (everywhere,) = builder("--ds_depth_1=1").build(lines("c --dsd2 0 --dst2 9"))
    assert everywhere.spec.deep_shrink == DeepShrink(1, 650, 0, 9, 0.5)


def test_size_conditioning_is_that_of_the_line_and_else_of_the_command_line():
    told, plain = builder("--original_width=100", "--crop_top=8").build(lines("a --ow 200 --nh 50 --cl 3", "b"))
    assert told.spec.sizes == SizeConditioning(original_width=200, original_height_negative=50, crop_top=8, crop_left=3)
    assert plain.spec.sizes == SizeConditioning(original_width=100, crop_top=8)


@pytest.mark.parametrize(
    ("line", "words", "message"),
    [
        ("a --ow 0", [], "column 3: option --ow '0' is not a number of pixels"),
        ("a --ct -1", [], "column 3: option --ct '-1' is not a number of pixels, or 0"),
        ("a --t 0.5", [], "column 3: option --t needs --image_path or --highres_fix_scale"),
        ("a --am 1", [], "column 3: option --am needs --network_weights"),
        ("a --am 1,2", ["--network_weights", "a"], r"column 3: option --am has 2 strengths for 1 network"),
        ("a --am 1", ["--network_weights", "a", "--sheet"], "column 3: option --am does not go with --sheet"),
        ("a --dsr 0.5", [], "line 1: Deep Shrink has no depth"),
        ("a --dsd1 1 --dst2 500", [], "line 1: Deep Shrink has no second depth"),
    ],
)
def test_what_says_nothing_in_this_run_is_named(line, words, message):
    asked = builder(*words)
    assert asked.build(lines(line)) == [] and re.search(message, asked.problems["line 1"])


def test_bytes_that_are_no_utf8_are_named():
    asked = builder()
    assert len(asked.build(lines("caf\udce9 --d 1", "a dog"))) == 1
    assert re.fullmatch("line 1: 'caf\ufffd --d 1' has bytes that are no UTF-8; .*UTF-8", asked.problems["line 1"])


def test_prompts_in_utf16_are_read_with_a_mark_and_named_without_one(tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    options = parse_options(["--ckpt=m", f"--from_file={path}"]).prompts
    for encoding in ("utf-16", "utf-8-sig"):
        path.write_bytes("a cat --d 1\na dog\n".encode(encoding))
        assert [prompt.text for prompt in read_prompts(options, [])] == ["a cat --d 1", "a dog"]
    for encoding in ("utf-16-le", "utf-16-be"):
        path.write_bytes("a cat --d 1\na dog\n".encode(encoding))
        with pytest.raises(UserError, match=r"prompts.txt: byte \d is no UTF-8; save the file as UTF-8"):
            read_prompts(options, [])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
        with pytest.raises(UserError, match=r"--from_file -: byte \d of standard input is no UTF-8"):
            read_prompts(parse_options(["--ckpt=m", "--from_file=-"]).prompts, [])


def huge_png(path):
    """A PNG of 60,000 x 60,000 pixels in its header, of which there are none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def test_an_image_too_large_to_open_is_named_wherever_it_comes_from(tmp_path):
    path = huge_png(tmp_path / "huge.png")
    options = parse_options(["--ckpt=m", f"--image_path={path}"])
    readers = (
        lambda: read_prompts(options.prompts, [path]),
        lambda: source_size(path),
        lambda: load_image(path, (64, 64)),
        lambda: load_mask(path, (64, 64)),
        lambda: Regions.load(path, None),
    )
    for read in readers:
        with pytest.raises(UserError, match="--(image|mask)_path .*huge.png: .*pixels") as error:
            read()
        assert "\n" not in str(error.value)
