"""Whole runs of gen_img_diffusers.py on the small model, through the real options."""

from __future__ import annotations

import builtins
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.errors import UserError
from library.generation import session as session_module
from library.generation.pipeline.latents import LatentSampler
from library.models.family import Model

ROOT = Path(__file__).parents[4]


def loras(gen_files, *names: str) -> list[str]:
    return ["--network_weights", *(str(gen_files / "out" / f"{name}.safetensors") for name in names)]


def alike(one: bytes, other: bytes) -> bool:
    """Whether two images are the same but for rounding."""
    return len(one) == len(other) and max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 2


# ---------------------------------------------------------------- images and their text


def test_trap_6_3_each_image_of_a_batch_has_its_own_text_and_trap_6_5_its_own_seed(draw, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --n blurry --d 7\na {dog} --n dark\n# no\na cat --w 65\n\nno negative\n", encoding="utf-8")
    made = draw(f"--from_file={prompts}", "--batch_size=3", "--seed=5,6", "--sequential_file_name", "--sampler=euler_a")
    assert made.code == 1  # a line was wrong
    out, err = capsys.readouterr()
    assert "skipped: " in err and "line 4, column 7: option --w '65' is not a multiple of 8" in err
    assert "3 of 3 images saved" in out and "1 line of prompts skipped" in out
    assert [(t["prompt"], t["negative-prompt"], t["seed"], t["raw-prompt"]) for t in made.texts] == [
        ("a cat", "blurry", "7", "a cat --n blurry --d 7"), ("a dog", "dark", "5", "a {dog} --n dark"),
        ("no negative", "", "6", "no negative"),
    ]  # fmt: skip
    begin = "a cat\nNegative prompt: blurry\nSteps: 2, Sampler: Euler a, CFG scale: 7.5, Seed: 7, "
    assert made.texts[0]["parameters"].startswith(begin)
    alone = draw("--prompt=a dog --n dark", "--seed=5", "--sampler=euler_a")
    assert alone.code == 0 and alike(alone.pixels()[0], made.pixels()[1])


def test_the_model_and_its_networks_are_in_the_text(draw, gen_files):
    from library.files import sha256_of_file
    from library.generation.outputs.png_text import lora_hash

    words = (*loras(gen_files, "mine"), "--network_mul", "0.8", f"--lora_dir={gen_files}", "--clip_skip=2")
    made = draw("--prompt=a <lora:style:0.5>", *words)
    text = made.texts[0]["parameters"]
    hashes = {name: lora_hash(gen_files / "out" / f"{name}.safetensors") for name in ("mine", "style")}
    assert text.startswith("a <lora:style:0.5> <lora:mine:0.8>\nSteps: 2, Sampler: DDIM, ")
    assert f"Model hash: {sha256_of_file(gen_files / 'model.safetensors')[:10]}, Model: model, Clip skip: 2, " in text
    assert f'Lora hashes: "mine: {hashes["mine"]}, style: {hashes["style"]}"' in text
    assert made.pixels() != draw("--prompt=a", f"--seed={made.texts[0]['seed']}", "--clip_skip=2").pixels()


def test_trap_6_5_both_stages_of_highres_fix_record_the_seed_that_draws_them(draw):
    words = ("--prompt=a", "--W=128", "--H=128", "--highres_fix_scale=0.5", "--highres_fix_steps=1", "--highres_fix_save_1st")
    made = draw(*words, "--seed=9")
    assert [path.name.split("_")[2:] for path in made.files] == [["0000", "9.png"], ["1000", "9.png"]]
    assert [(t["seed"], t["steps"], Image.open(p).size) for t, p in zip(made.texts, made.files, strict=True)] == [
        ("9", "1", (64, 64)), ("9", "2", (128, 128)),
    ]  # fmt: skip
    again = draw(*words, f"--seed={made.texts[1]['seed']}")
    assert again.pixels() == made.pixels()
    latents = draw(*words, "--seed=9", "--highres_fix_latents_upscaling")
    assert len(latents.files) == 2 and latents.pixels()[0] == made.pixels()[0] != latents.pixels()[1]


def test_both_stages_of_an_image_have_one_number_in_a_batch_too(draw):
    words = ("--prompt=a", "--W=128", "--H=128", "--highres_fix_scale=0.5", "--highres_fix_steps=1", "--highres_fix_save_1st")
    made = draw(*words, "--steps=1", "--seed=5,6", "--images_per_prompt=2", "--batch_size=2")
    assert [path.name.split("_")[2:] for path in made.files] == [
        ["0000", "5.png"], ["0001", "6.png"], ["1000", "5.png"], ["1001", "6.png"],
    ]  # fmt: skip


def test_trap_6_11_sequential_names_go_on_over_iterations_and_runs(draw, tmp_path):
    words = ("--prompt=a", "--sequential_file_name", "--n_iter=2", "--steps=1", f"--outdir={tmp_path / 'same'}")
    first = draw(*words)
    kept = first.pixels()
    second = draw(*words)
    assert [path.name for path in second.files] == [f"im_00000{number}.png" for number in (1, 2, 3, 4)]
    assert second.pixels()[:2] == kept


def test_from_images_and_their_own_prompts(draw, tmp_path):
    source = draw("--prompt=a cat --n dog", "--seed=1")
    made = draw(f"--image_path={source.folder}", "--strength=0.5", "--use_original_file_name", "--images_per_prompt=2")
    name = source.files[0].stem
    assert [path.name for path in made.files] == [f"{name}.png", f"{name}_001.png"]
    assert [(t["prompt"], t["negative-prompt"]) for t in made.texts] == [("a cat", "dog")] * 2
    assert "Denoising strength: 0.5" in made.texts[0]["parameters"]
    assert draw(f"--image_path={source.files[0]}", "--prompt=a --w 64", "--seed=1").code == 1  # one side alone
    sized = draw(f"--image_path={source.files[0]}", "--prompt=a --w 96 --h 64 --t 0.5", "--seed=1")
    assert Image.open(sized.files[0]).size == (96, 64)


# ---------------------------------------------------------------- the sheet


def test_sheet_compares_networks_one_by_one(draw, gen_files, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --d 3\n", encoding="utf-8")
    words = (*loras(gen_files, "mine", "style"), "--sheet", "--seed=1,2", "--batch_size=4", "--steps=1", "--sequential_file_name")
    made = draw(f"--from_file={prompts}", *words, "--sheet_strengths", "0", "0.5")
    assert made.code == 0 and len(made.files) == 4 * 3
    tags = [re.findall("<lora:.*?>", text["parameters"]) for text in made.texts]
    assert tags[::4] == [[], ["<lora:mine:0.5>"], ["<lora:style:0.5>"]]
    assert [text["seed"] for text in made.texts[:4]] == ["1", "2", "3", "3"]
    (sheet,) = made.folder.glob("sheet_*.png")
    told = capsys.readouterr().out
    assert f"sheet: {sheet}" in told and f"as a page: {sheet.with_suffix('.html')}" in told
    data = json.loads(re.search(r'id="data">(.*?)</script>', sheet.with_suffix(".html").read_text(encoding="utf-8"))[1])
    assert data["networks"] == [None, "mine x 0.5", "style x 0.5"] and [spec["seed"] for spec in data["specs"]] == [1, 2, 3, 3]
    assert [[cell["file"] for cell in row] for row in data["cells"]] == [
        [made.files[4 * column + row].name for column in range(3)] for row in range(4)
    ]
    assert all((made.folder / cell["copy"]).is_file() for row in data["cells"] for cell in row)
    assert Image.open(sheet).width > 3 * 192 and Image.open(sheet).height > 4 * 192
    alone = draw("--prompt=a cat", *loras(gen_files, "style"), "--network_mul", "0.5", "--seed=1", "--steps=1")
    assert alike(alone.pixels()[0], made.pixels()[8])


# ---------------------------------------------------------------- sizes


def test_without_sizes_an_image_has_the_model_s_own(gen_files, tmp_path):
    from safetensors.torch import load_file

    from library.generation.pipeline.sizes import default_size
    from library.models.loading import load_stable_diffusion
    from library.models.saving import save_stable_diffusion
    from library.testing import small_stable_diffusion

    model = load_stable_diffusion(str(gen_files / "model.safetensors"))
    assert default_size(model) == (512, 512)
    model.denoiser.register_to_config(sample_size=8)  # as that of the base model
    save_stable_diffusion(model, tmp_path / "folder")
    assert default_size(load_stable_diffusion(str(tmp_path / "folder"))) == (64, 64)
    small = {"unet_channels": (32, 32, 32, 32), "vae_channels": (32, 32, 32, 32), "text_width": 32, "text_layers": 1}
    assert default_size(small_stable_diffusion(family="sd2", v_parameterization=True, **small)) == (768, 768)
    save_file(load_file(gen_files / "model.safetensors"), tmp_path / "tiny.safetensors", {"modelspec.resolution": "64x96"})
    assert default_size(load_stable_diffusion(str(tmp_path / "tiny.safetensors"))) == (64, 96)


# ---------------------------------------------------------------- failing and stopping


def test_an_image_that_fails_is_named_and_the_others_are_made(draw, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb <lora:broken:1>\nc\nd <lora:brokn:1>\n", encoding="utf-8")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    made = draw(f"--from_file={prompts}", f"--lora_dir={tmp_path}", "--batch_size=3", "--sequential_file_name")
    assert made.code == 1 and [text["prompt"] for text in made.texts] == ["a", "c"]
    out, err = capsys.readouterr()
    assert re.search("failed: .*line 2.*broken.safetensors", err)
    assert re.search("skipped: .*line 4: unknown LoRA 'brokn' .*did you mean 'broken'", err)
    assert "2 of 3 images saved" in out and "1 failed" in out and "1 line of prompts skipped" in out


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C in the middle of the image of this prompt."""

    def at(prompt: str) -> None:
        sample = LatentSampler.sample

        def until(self, stage, states, on_step):
            if states[0].spec.prompt == prompt:
                raise KeyboardInterrupt
            return sample(self, stage, states, on_step)

        monkeypatch.setattr(LatentSampler, "sample", until)

    return at


def test_an_error_that_nobody_foresaw_costs_its_image_alone(draw, monkeypatch, tmp_path, capsys):
    decode = Model.decode
    outcomes = iter([None, RuntimeError("cuDNN is\nunhappy"), None])

    def sometimes(*arguments):
        error = next(outcomes)
        if error:
            raise error
        return decode(*arguments)

    monkeypatch.setattr(Model, "decode", sometimes)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n", encoding="utf-8")
    made = draw(f"--from_file={prompts}", "--sequential_file_name")
    assert made.code == 1 and [text["prompt"] for text in made.texts] == ["a", "c"]
    assert re.search(f"failed: {re.escape(str(prompts))}, line 2: .*cuDNN is unhappy", capsys.readouterr().err)


def test_ctrl_c_saves_what_is_drawn_and_says_how_much(draw, interrupted, tmp_path, capsys):
    interrupted("c")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\nd\n", encoding="utf-8")
    made = draw(f"--from_file={prompts}", "--sheet")
    assert made.code == 130 and len(made.files) == 2
    assert "interrupted: 2 of 4 images saved" in capsys.readouterr().out
    assert len(list(made.folder.glob("sheet_*.png"))) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_in_the_script_itself(gen_files, tmp_path):
    words = [f"--ckpt={gen_files / 'model.safetensors'}", "--from_file=-", "--W=64", "--H=64", "--steps=4", "--n_iter=500"]
    program = [sys.executable, str(ROOT / "gen_img_diffusers.py"), *words, f"--outdir={tmp_path / 'out'}"]
    # Whoever runs the tests in the background may have SIGINT ignored, and a child would inherit that.
    reset = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(program, **pipes, **reset, encoding="utf-8")
    try:
        process.stdin.write("a cat\na dog --q\n")
        process.stdin.close()
        process.stdin = None
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("out/*.png")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    saved = len(list(tmp_path.glob("out/*.png")))
    assert f"interrupted: {saved} of 500 images saved" in out and 0 < saved < 500
    assert "standard input, line 2, column 7: unknown option '--q'" in err.replace("in standard", "standard") or "column 7" in err
    assert "Traceback" not in err and not list(tmp_path.glob("out/.*"))


# ---------------------------------------------------------------- asking


def test_trap_6_11_prompts_of_a_list_are_drawn_before_others_are_asked_for(draw, monkeypatch, capsys):
    answers = iter(["b --w 3", "c --d 4"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(answers, None) or (_ for _ in ()).throw(EOFError))
    shown = []
    monkeypatch.setattr(session_module, "show", shown.append)
    made = draw("--prompt=a", "--interactive", "--n_iter=3", "--seed=5")
    assert made.code == 0 and [text["prompt"] for text in made.texts] == ["a", "c"]
    assert len(shown) == 1 and "prompt 1, column 3: option --w '3'" in capsys.readouterr().err
    answers = iter(["c --d 4"])
    draw("--interactive", "--no_preview", f"--outdir={made.folder}")
    assert len(shown) == 1 and len(made.files) == 3


def test_a_wrong_line_of_the_list_is_reported_once_and_counts_in_an_interactive_run_too(draw, monkeypatch, capsys):
    answers = iter(["c", "d"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(answers, None) or (_ for _ in ()).throw(EOFError))
    made = draw("--prompt=a --w 3", "--interactive", "--no_preview", "--steps=1")
    out, err = capsys.readouterr()
    assert made.code == 1 and len(made.files) == 2 and "1 line of prompts skipped" in out
    assert err.count("--prompt, column 3: option --w '3'") == 1


# ---------------------------------------------------------------- bad input


def wrong_lora(path: Path, prefix: str, width: int) -> Path:
    save_file({f"{prefix}.lora_down.weight": torch.ones(2, width), f"{prefix}.lora_up.weight": torch.ones(width, 2)}, path)
    return path


def test_a_lora_for_another_model_is_named(draw, tmp_path):
    other = wrong_lora(tmp_path / "sdxl.safetensors", "lora_te2_text_model_encoder_layers_0_mlp_fc1", 8)
    with pytest.raises(UserError, match="sdxl.safetensors") as error:
        draw("--prompt=a", "--network_weights", str(other))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt=a --w 9"], "--prompt, column 3: option --w '9' .*; nothing is left to draw"),
        (["--prompt=a", "--lora_dir=nothing"], "--lora_dir nothing: there is no such folder"),
        (["--prompt=a", "--vae=nothing"], "nothing"),
        (["--prompt=a", "--clip_skip=99"], "--clip_skip 99: the model's text encoder has 2 layers; give 1 to 2"),
    ],
)
def test_wrong_input_ends_in_one_line(draw, words, message):
    with pytest.raises(UserError, match=message) as error:
        draw(*words)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_read(draw, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--outdir .*file.*: cannot be written"):
        draw("--ckpt=nothing", "--prompt=a", f"--outdir={tmp_path / 'file'}")


def test_a_black_image_is_named_with_the_cure(draw, gen_files, tmp_path, capsys):
    from safetensors.torch import load_file

    tensors = load_file(gen_files / "model.safetensors")
    tensors["first_stage_model.decoder.conv_out.bias"][:] = float("nan")
    save_file(tensors, tmp_path / "black.safetensors")
    made = draw(f"--ckpt={tmp_path / 'black.safetensors'}", "--prompt=a")
    assert made.code == 1 and not made.files
    assert re.search("failed: .*black image.*(--vae|--no_half_vae)", capsys.readouterr().err)


def test_zero_terminal_snr_without_velocity_says_why(draw, gen_files):
    with pytest.raises(UserError, match="--zero_terminal_snr needs a model that predicts velocity.*add --v_parameterization"):
        draw("--prompt=a", "--zero_terminal_snr")
    assert draw("--prompt=a", "--zero_terminal_snr", "--v_parameterization", "--steps=1").code == 0


def test_inpainting_with_a_lora_keeps_the_black_part(draw, gen_files, tmp_path):
    Image.new("RGB", (64, 64), (10, 200, 10)).save(tmp_path / "source.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    words = (f"--image_path={tmp_path / 'source.png'}", f"--mask_path={tmp_path / 'mask.png'}", "--seed=1")
    made = draw("--prompt=a", *words, *loras(gen_files, "mine"))
    with Image.open(made.files[0]) as image:
        assert image.crop((0, 0, 32, 64)).getcolors() == [(32 * 64, (10, 200, 10))] and len(image.getcolors(5000)) > 2
    assert made.pixels() != draw("--prompt=a", *words).pixels()  # and the network acts
    regional = draw("--prompt=a AND b", *words, *loras(gen_files, "mine", "style"))
    with Image.open(regional.files[0]) as image:
        assert len(image.crop((0, 0, 32, 64)).getcolors(5000)) > 1


def test_a_byte_that_is_no_utf8_ends_no_interactive_session(gen_files, tmp_path):
    words = [f"--ckpt={gen_files / 'model.safetensors'}", "--interactive", "--no_preview", "--W=64", "--H=64", "--steps=1"]
    program = [sys.executable, str(ROOT / "gen_img_diffusers.py"), *words, f"--outdir={tmp_path / 'out'}"]
    done = subprocess.run(program, input=b"a cat\ncaf\xe9\na dog\n", capture_output=True, timeout=120, check=False)
    assert b"Traceback" not in done.stderr and b"prompt 2: 'caf" in done.stderr
    assert done.returncode == 0 and len(list(tmp_path.glob("out/*.png"))) == 2
