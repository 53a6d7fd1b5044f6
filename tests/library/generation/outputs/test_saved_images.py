"""Names of images, their text fields, and how they reach the disk."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.diffusion.samplers import SAMPLERS
from library.errors import UserError
from library.files import write_new
from library.generation.outputs.file_names import FileNames
from library.generation.outputs.image_writer import MAX_WAITING, ImageWriter
from library.generation.outputs.png_text import (
    RunFacts,
    UsedLora,
    lora_hash,
    loras_with_hashes,
    model_hash,
    parameters,
    text_fields,
)
from library.generation.prompts.spec import PromptSpec, SizeConditioning

IMAGE = Image.new("RGB", (8, 8), "red")


def first(names) -> str:
    return next(iter(names)).name


# ---------------------------------------------------------------- names


def test_names_have_time_number_and_seed(tmp_path):
    names = FileNames(tmp_path)
    assert [names.take_number(), names.take_number()] == [0, 1]
    assert re.fullmatch(r"im_\d{14}_000_7\.png", first(names.candidates(0, 1, 7, None)))
    assert re.fullmatch(r"im_\d{14}_001_8\.png", first(names.candidates(1, 1, 8, None)))
    assert re.fullmatch(r"im_\d{14}_001_8_2\.png", list(islice(names.candidates(1, 1, 8, None), 3))[2].name)


def test_trap_6_11_sequential_names_go_on_after_those_in_the_folder(tmp_path):
    for name in ("im_000002.png", "im_000007.png", "im_x.png", "other.png"):
        (tmp_path / name).touch()
    names = FileNames(tmp_path, sequential=True)
    assert [names.take_number(), names.take_number()] == [8, 9]
    assert first(names.candidates(8, 1, 5, None)) == "im_000008.png"
    assert FileNames(tmp_path / "new", sequential=True).take_number() == 1


def test_two_stages_have_a_mark_each_and_one_number(tmp_path):
    names = FileNames(tmp_path, sequential=True, stages=True)
    assert [first(names.candidates(1, stage, 5, None)) for stage in (0, 1)] == ["im_0000001.png", "im_1000001.png"]
    (tmp_path / "im_1000012.png").touch()
    assert FileNames(tmp_path, sequential=True, stages=True).take_number() == 13
    assert re.fullmatch(r"im_\d{14}_0000_5\.png", first(FileNames(tmp_path, stages=True).candidates(0, 0, 5, None)))


def test_original_names(tmp_path):
    names = FileNames(tmp_path, original=True).candidates(0, 1, 5, Path("photos/cat.jpg"))
    assert [path.name for path in islice(names, 3)] == ["cat.png", "cat_001.png", "cat_002.png"]


def test_trap_6_11_nothing_is_ever_replaced(tmp_path):
    taken = tmp_path / "a.png"
    taken.write_text("mine", encoding="utf-8")
    path = write_new((tmp_path / f"{name}.png" for name in "ab"), IMAGE.save)
    assert path == tmp_path / "b.png" and taken.read_text(encoding="utf-8") == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_two_writers_of_one_name_both_keep_their_file(tmp_path):
    barrier, paths = threading.Barrier(4), []

    def write():
        def save(temporary):
            IMAGE.save(temporary)
            barrier.wait()  # all four are ready to take the name

        paths.append(write_new((tmp_path / f"{number}.png" for number in range(9)), save))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in paths) == ["0.png", "1.png", "2.png", "3.png"]


def test_a_file_system_without_links(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", lambda *a: (_ for _ in ()).throw(OSError("no links here")))
    for expected in ("0.png", "1.png"):
        assert write_new((tmp_path / f"{number}.png" for number in range(3)), IMAGE.save).name == expected
    assert len(list(tmp_path.iterdir())) == 2


def test_an_image_that_breaks_off_leaves_nothing(tmp_path):
    def broken(temporary):
        temporary.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*a.png: No space left on device"):
        write_new([tmp_path / "a.png"], broken)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- text fields


def read_as_web_ui(text: str) -> dict[str, str]:
    """The layout as the A1111 web UI reads it: prompt lines, negative prompt lines, then `Key: value` pairs in the last line."""
    *lines, last = text.strip().split("\n")
    found = {"Prompt": "", "Negative prompt": ""}
    target = "Prompt"
    for line in lines:
        if line.startswith("Negative prompt:"):
            target, line = "Negative prompt", line.removeprefix("Negative prompt:")
        found[target] = "\n".join(part for part in (found[target], line.strip()) if part)
    for key, value in re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last):
        found[key] = value.strip('"')
    return found


FACTS = RunFacts("mymodel", "0123456789", clip_skip=2, vae="good.vae.pt", highres_steps=28, upscaler="Lanczos")
SPEC = PromptSpec("a (cat:1.2), sitting", "blurry, bad", 512, 768, 7, 7.0, 20, "euler_a")


def test_web_ui_reads_parameters_back():
    found = read_as_web_ui(parameters(SPEC, FACTS, [UsedLora("ink", 0.8, "0123456789ab"), UsedLora("toy", 1.0, "ba9876543210")]))
    assert found == {
        "Prompt": "a (cat:1.2), sitting <lora:ink:0.8> <lora:toy:1>", "Negative prompt": "blurry, bad", "Steps": "20",
        "Sampler": "Euler a", "CFG scale": "7", "Seed": "7", "Size": "512x768", "Model hash": "0123456789", "Model": "mymodel",
        "VAE": "good.vae.pt", "Clip skip": "2", "Lora hashes": "ink: 0123456789ab, toy: ba9876543210", "RNG": "CPU",
    }  # fmt: skip


def test_parameters_letter_by_letter():
    text = parameters(SPEC, RunFacts("mymodel", "0123456789"), [UsedLora("ink", 0.8, "0123456789ab")])
    assert text == (
        "a (cat:1.2), sitting <lora:ink:0.8>\nNegative prompt: blurry, bad\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 7, Size: 512x768, Model hash: 0123456789, Model: mymodel, "
        'Lora hashes: "ink: 0123456789ab", RNG: CPU'
    )


def test_a_network_that_the_prompt_names_is_named_once():
    spec = PromptSpec("a cat <lora:ink:0.5>", seed=1)
    assert read_as_web_ui(parameters(spec, FACTS, [UsedLora("ink", 0.5, "0" * 12)]))["Prompt"] == "a cat <lora:ink:0.5>"


def test_a_network_that_acts_twice_is_named_with_its_whole_strength(tmp_path):
    """By two options, or by an option and the prompt."""
    save_file({"a": torch.ones(1)}, tmp_path / "ink.safetensors")
    twice = loras_with_hashes([(tmp_path / "ink.safetensors", 0.8), (tmp_path / "ink.safetensors", 0.5)])
    assert [(lora.name, round(lora.strength, 6)) for lora in twice] == [("ink", 1.3)]
    found = read_as_web_ui(parameters(SPEC, FACTS, twice))
    assert found["Prompt"].endswith("<lora:ink:1.3>") and found["Lora hashes"] == f"ink: {twice[0].hash}"
    called = PromptSpec("a cat <lora:ink:0.5>", seed=1)
    assert read_as_web_ui(parameters(called, FACTS, twice))["Prompt"] == "a cat <lora:ink:0.5> <lora:ink:0.8>"


def test_two_stages_as_the_web_ui_has_them():
    found = read_as_web_ui(parameters(SPEC, FACTS, (), 1, (256, 384)))
    assert (found["Steps"], found["Size"], found["Hires steps"], found["Hires resize"]) == ("28", "256x384", "20", "512x768")
    assert (found["Hires upscaler"], found["Denoising strength"]) == ("Lanczos", "0.8")
    stage = read_as_web_ui(parameters(SPEC, FACTS, (), 0, (256, 384)))
    assert (stage["Steps"], stage["Size"]) == ("28", "256x384") and "Hires steps" not in stage


def test_own_fields():
    fields = text_fields(SPEC, "a {x|y} --w 512", FACTS, (), None, None)
    assert {key: value for key, value in fields.items() if key != "parameters"} == {
        "prompt": "a (cat:1.2), sitting", "seed": "7", "sampler": "euler_a", "steps": "20", "scale": "7",
        "negative-prompt": "blurry, bad", "raw-prompt": "a {x|y} --w 512",
    }  # fmt: skip
    assert text_fields(PromptSpec(seed=1, negative_scale=1.5), "", FACTS, (), None, None)["negative-scale"] == "1.5"
    assert text_fields(SPEC, "", FACTS, (), 0, (64, 64))["steps"] == "28"
    told = text_fields(PromptSpec(seed=1, sizes=SizeConditioning(original_width=2048, crop_left=3)), "", FACTS, (), None, None)
    assert (told["original-width"], told["crop-left"]) == ("2048", "3") and "original-height" not in told


def test_a_prompt_over_several_lines_does_not_break_the_layout():
    found = read_as_web_ui(parameters(PromptSpec("a\nSteps: 3", "b\nc", seed=1), RunFacts("odd, name: x")))
    assert (found["Prompt"], found["Negative prompt"], found["Model"]) == ("a Steps: 3", "b c", "odd, name: x")


def test_every_sampler_has_a_name_there():
    names = {name: parameters(PromptSpec("a", seed=1, sampler=name), RunFacts("m")) for name in SAMPLERS}
    assert "Sampler: DPM++ 2M," in names["dpmsolver++"] and "Sampler: Euler a," in names["k_euler_a"]


def test_hashes_are_the_web_ui_s(tmp_path):
    tensors = {"w": torch.arange(4.0)}
    data = tensors["w"].numpy().tobytes()
    save_file(tensors, tmp_path / "plain.safetensors")
    assert lora_hash(tmp_path / "plain.safetensors") == hashlib.sha256(data).hexdigest()[:12]
    save_file(tensors, tmp_path / "said.safetensors", {"sshs_model_hash": "abcdef" * 10})
    assert lora_hash(tmp_path / "said.safetensors") == "abcdefabcdef"
    (tmp_path / "old.pt").write_bytes(b"weights")
    assert lora_hash(tmp_path / "old.pt") == hashlib.sha256(b"weights").hexdigest()[:12]
    assert model_hash(tmp_path / "old.pt") == hashlib.sha256(b"weights").hexdigest()[:10]
    assert model_hash(tmp_path) is model_hash(None) is None


# ---------------------------------------------------------------- the writer


def test_images_are_saved_while_the_next_ones_are_made(tmp_path):
    going_on = threading.Event()

    def text():
        assert going_on.wait(10)
        return {"prompt": "a Kätzchen 猫"}

    with ImageWriter() as writer:
        writer.add(IMAGE, [tmp_path / "a.png"], text)
        assert writer.saved == []  # and yet we are here: the drawing goes on
        going_on.set()
    assert writer.saved == [tmp_path / "a.png"]
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.text == {"prompt": "a Kätzchen 猫"} and saved.getpixel((0, 0)) == (255, 0, 0)


def test_unsaved_images_do_not_pile_up(tmp_path):
    waiting, most = [], []

    def text():
        most.append(len(waiting))
        time.sleep(0.002)
        waiting.pop()
        return {}

    with ImageWriter() as writer:
        for number in range(3 * MAX_WAITING):
            waiting.append(number)
            writer.add(IMAGE, [tmp_path / f"{number}.png"], text)
    assert len(writer.saved) == 3 * MAX_WAITING and max(most) <= MAX_WAITING + 2


def test_a_disk_that_is_full_ends_the_run_with_its_name(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), ImageWriter() as writer:
        writer.add(IMAGE, [tmp_path / "file" / "a.png"], dict)
        writer.wait()
