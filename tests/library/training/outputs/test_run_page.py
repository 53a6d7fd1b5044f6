from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
from PIL import Image
from small_runs import AfterStep, image_folder, train, use_two_blocks, words_of_a_run

from library.training.outputs import run_page

SECRET = "hf_very_secret"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    use_two_blocks(monkeypatch.setattr)


def data_of(page: Path) -> dict:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(found[1])


def two_datasets(folder: Path) -> Path:
    for name in ("one", "two"):
        image_folder(folder / name, 3)
    text = "".join(
        f'[[datasets]]\nresolution = 64\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = "{(folder / name).as_posix()}"\n'
        'caption_extension = ".txt"\n'
        for name in ("one", "two")
    )  # fmt: skip
    (folder / "data.toml").write_text(text, encoding="utf-8")
    return folder / "data.toml"


@pytest.mark.option("no_report")
def test_a_run_leaves_a_page_unless_it_is_not_wanted(tmp_path):
    images = image_folder(tmp_path / "images")
    train(words_of_a_run(images, tmp_path / "out", "--max_train_steps=2", "--no_report"))
    assert not list((tmp_path / "out").glob("*.html"))
    (images / "0.txt").write_text("</script><script>alert(1)</script>", encoding="utf-8")
    words = words_of_a_run(images, tmp_path / "out", "--max_train_steps=4", "--save_every_n_steps=2", f"--wandb_api_key={SECRET}")
    train(words)
    page = data_of(tmp_path / "out" / "mine.html")
    assert (page["state"], page["step"], page["steps"]) == ("finished", 4, 4)
    assert page["raw"][0] == [1, 2, 3, 4] and len(page["mean"][0]) > 1  # a first epoch has a curve
    assert page["rates"][0]["curve"][0][-1] == 4
    files = {file["name"]: (file["step"], file["bytes"]) for file in page["files"]}
    assert files == {
        name: (step, (tmp_path / "out" / name).stat().st_size)
        for name, step in (("mine-step00000002.safetensors", 2), ("mine-step00000004.safetensors", 4), ("mine.safetensors", 4))
    }
    assert page["secrets"] == ["wandb_api_key"] and SECRET not in (tmp_path / "out" / "mine.html").read_text(encoding="utf-8")
    assert (
        "--max_train_steps=4" in page["command"]
        and {"name": "learning_rate", "value": "0.001"}.items()
        <= {key: value for row in page["settings"] if row["name"] == "learning_rate" for key, value in row.items()}.items()
    )
    assert any("without effect" in line and "wandb_api_key" in line for line in page["warnings"])
    data = page["data"]
    assert data["datasets"][0]["buckets"] == [[64, 64, 5, 5]] and data["tokens"]["counted"] == 5
    assert "</script><script>alert(1)</script>" in [example["caption"] for example in data["examples"]]
    assert all((tmp_path / "out" / example["src"]).is_file() for example in data["examples"])


def test_the_page_is_rewritten_while_training_goes_on_and_is_always_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(run_page, "LEAST_SECONDS", 0)
    monkeypatch.setattr(run_page, "COST", 0)
    seen = []

    class AtOnce:
        """An executor whose work is done when it is handed over."""

        def submit(self, work, *words) -> Future:
            done: Future = Future()
            done.set_result(work(*words))
            return done

        def shutdown(self) -> None:
            pass

    monkeypatch.setattr(run_page, "ThreadPoolExecutor", lambda *_: AtOnce())

    def look(run) -> None:
        seen.append(data_of(run.page.path))

    train(words_of_a_run(image_folder(tmp_path / "images"), tmp_path / "out", "--max_train_steps=3"), AfterStep(look))
    assert [(page["state"], page["step"]) for page in seen] == [("running", 1), ("running", 2), ("running", 3)]
    assert all(page["left"] >= 0 for page in seen)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_it_says_why_a_run_failed(tmp_path):
    def fail(run) -> None:
        raise OSError("the disk <is> full")

    with pytest.raises(Exception, match="full"):
        train(words_of_a_run(image_folder(tmp_path / "images"), tmp_path / "out"), AfterStep(fail, step=2))
    page = data_of(tmp_path / "out" / "mine.html")
    assert (page["state"], page["step"]) == ("failed", 2) and "the disk <is> full" in page["reason"]


def test_a_page_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    (tmp_path / "out" / "mine.html").mkdir(parents=True)
    train(words_of_a_run(image_folder(tmp_path / "images"), tmp_path / "out", "--max_train_steps=2"))
    assert (tmp_path / "out" / "mine.safetensors").is_file()
    assert capsys.readouterr().out.count("mine.html was not written") == 1


def test_validation_marks_the_best_file_and_datasets_have_curves(tmp_path):
    words = words_of_a_run(tmp_path, tmp_path / "out", f"--dataset_config={two_datasets(tmp_path)}", "--max_train_steps=8",
                           "--validation_split=0.4", "--validate_every_n_steps=4")  # fmt: skip
    train(words)
    page = data_of(tmp_path / "out" / "mine.html")
    best = {file["name"] for file in page["files"] if file["best"]}
    assert "mine-best.safetensors" in best and page["best"][0] in (4, 8) and len(page["validation"]) == 2
    assert [part["number"] for part in page["parts"]] == [1, 2]
    assert all(len(part["curve"][0]) > 1 for part in page["parts"])


def test_a_resumed_run_continues_the_page(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    images = two_datasets(tmp_path)

    def words(folder: str, *more: str) -> list[str]:
        return words_of_a_run(
            tmp_path, tmp_path / folder, f"--dataset_config={images}", "--save_every_n_steps=2", "--save_state",
            f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=2", *more,
        )  # fmt: skip

    train(words("whole", "--max_train_steps=6"))
    train(words("parts", "--max_train_steps=4"))
    train(words("parts", "--max_train_steps=6", f"--resume={tmp_path / 'parts' / 'mine-step00000004-state'}"))
    whole, parts = (data_of(tmp_path / folder / "mine.html") for folder in ("whole", "parts"))
    for key in ("raw", "mean", "parts", "rates"):
        assert parts[key] == whole[key], key
    assert parts["samples"]["steps"] == [2, 4, 6]
    assert all((tmp_path / "parts" / name).is_file() for step in parts["samples"]["images"].values() for name in step["0"])
    assert [(file["name"], file["step"]) for file in parts["files"]] == [(file["name"], file["step"]) for file in whole["files"]]
    assert parts["began"] == data_of(tmp_path / "parts" / "mine.html")["began"]


def test_a_long_run_stays_small(tmp_path, monkeypatch):
    """100,000 steps with 500 samples: less than 2 MB, and under a second to write."""

    def grow(run) -> None:
        run.losses.steps[:] = range(1, 100_001)
        run.losses.values[:] = [1 / (1 + step % 977) for step in range(100_000)]
        run.losses.rates = {name: [(step, step * 1e-9) for step in range(100_000)] for name in "abcdefgh"}
        run.previews.drawn = [(step * 1000, f"{step * 1000:06d}", number) for step in range(125) for number in range(4)]
        run.previews.folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "sample.png")
        for _, moment, number in run.previews.drawn:
            shutil.copyfile(tmp_path / "sample.png", run.previews.folder / f"mine_{moment}_{number:02d}_20260101000000_1.png")

    run = train(
        words_of_a_run(image_folder(tmp_path / "images"), tmp_path / "out", "--max_train_steps=2"), AfterStep(grow, step=2)
    )
    page = data_of(run.page.path)
    assert page["batches"] == 100_001 and len(page["samples"]["steps"]) == 125
    assert run.page.path.stat().st_size < 1_000_000
