"""library/generation/extras/embeddings.py: textual inversion."""

from __future__ import annotations

import pytest
import torch
from reference_pipelines import SMALL
from safetensors.torch import save_file

from library.errors import UserError
from library.generation.extras.embeddings import add_embeddings
from library.models.clip import encode_text, token_chunks, tokenize_prompts
from library.testing import small_sdxl, small_stable_diffusion


@pytest.fixture
def model():
    return small_stable_diffusion(seed=0, **SMALL)


def ids_of(model, prompt):
    ids, weights = token_chunks(model.tokenizers[0], [prompt], None)
    return [token for token in ids.flatten().tolist() if token < 49406 or token > 49407], weights


def test_words_become_their_vectors_and_everything_else_stays(model, tmp_path):
    torch.manual_seed(0)
    vectors = torch.randn(3, 64)
    save_file({"emb_params": vectors}, tmp_path / "mystyle.safetensors")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 64)}, "name": "x"}, tmp_path / "web-ui.pt")
    torch.save({"<thing>": torch.zeros(64)}, tmp_path / "thing1.bin")
    before, _ = ids_of(model, "a photo, xmystyle")
    plain = encode_text(model.text_encoders[0], token_chunks(model.tokenizers[0], ["a photo"], None)[0])
    files = [str(tmp_path / name) for name in ("mystyle.safetensors", "web-ui.pt", "thing1.bin")]
    assert add_embeddings(model, files) == ["mystyle", "web-ui", "thing1"]
    table = model.text_encoders[0].get_input_embeddings().weight
    assert torch.equal(table[49408:49411], vectors) and torch.equal(table[49411:49413], torch.ones(2, 64)) and len(table) == 49414
    assert ids_of(model, "mystyle")[0] == [49408, 49409, 49410]
    assert ids_of(model, "web-ui, thing1")[0] == [49411, 49412, 267, 49413]
    assert ids_of(model, "a photo, xmystyle")[0] == before
    assert torch.equal(encode_text(model.text_encoders[0], token_chunks(model.tokenizers[0], ["a photo"], None)[0]), plain)


def test_a_weight_holds_for_all_its_vectors(model, tmp_path):
    torch.manual_seed(0)
    save_file({"emb_params": torch.randn(2, 64)}, tmp_path / "mystyle.safetensors")
    add_embeddings(model, [str(tmp_path / "mystyle.safetensors")])
    ids, weights = ids_of(model, "a (mystyle:1.5)")
    assert ids == [320, 49408, 49409] and weights[0, 0, 1:5].tolist() == [1.0, 1.5, 1.5, 1.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cat", {"emb_params": torch.zeros(1, 64)}, "'cat' is a word of the vocabulary already"),
        ("wide", {"emb_params": torch.zeros(1, 768)}, "vectors of 768 numbers.* 64;.*another Stable Diffusion version"),
        ("lora", {"a": torch.zeros(1, 64), "b": torch.zeros(1, 64)}, "no textual inversion"),
        ("number", {"emb_params": torch.tensor(1.0)}, "a table of vectors is needed, its shape is a single number"),
        ("empty", {"emb_params": torch.zeros(0, 64)}, "a table of vectors is needed, its shape is 0 x 64"),
        ("nan", {"emb_params": torch.full((1, 64), float("nan"))}, "holds NaN or infinity, which would make every image black"),
        ("deep", {"emb_params": torch.zeros(1, 2, 64)}, "a table of vectors is needed, its shape is 1 x 2 x 64"),
        ("sdxl", {"clip_l": torch.zeros(1, 64), "clip_g": torch.zeros(1, 64)}, r"made for 2 text encoders, SD 1.x has 1"),
    ],
)
def test_wrong_files_are_named(model, tmp_path, name, content, message):
    file = tmp_path / f"{name}.safetensors"
    save_file(content, file)
    with pytest.raises(UserError, match=message) as error:
        add_embeddings(model, [str(file)])
    assert str(file) in str(error.value)
    with pytest.raises(UserError, match="there is no such file"):
        add_embeddings(model, ["nowhere.pt"])


def test_a_suffix_in_capitals_and_a_file_that_holds_no_table(model, tmp_path):
    save_file({"emb_params": torch.ones(1, 64)}, tmp_path / "mystyle.SAFETENSORS")
    assert add_embeddings(model, [str(tmp_path / "mystyle.SAFETENSORS")]) == ["mystyle"]
    torch.save([1, 2], tmp_path / "list.PT")
    with pytest.raises(UserError, match="list.PT"):
        add_embeddings(model, [str(tmp_path / "list.PT")])


def test_on_sdxl_each_text_encoder_gets_its_own_vectors(tmp_path):
    torch.manual_seed(0)
    model = small_sdxl()
    widths = [encoder.config.hidden_size for encoder in model.text_encoders]
    one, two = (torch.randn(2, width) for width in widths)
    save_file({"clip_g": two, "clip_l": one}, tmp_path / "mystyle.safetensors")
    before = model.encode_text(tokenize_prompts(model.tokenizers, ["a photo"], 1))
    assert add_embeddings(model, [str(tmp_path / "mystyle.safetensors")]) == ["mystyle"]
    for encoder, vectors in zip(model.text_encoders, (one, two), strict=True):
        assert torch.equal(encoder.get_input_embeddings().weight[49408:], vectors)
    after = model.encode_text(tokenize_prompts(model.tokenizers, ["a photo", "a mystyle"], 1))
    for name in ("context", "pooled"):
        assert torch.allclose(after[name][:1], before[name], atol=1e-5) and not torch.allclose(after[name][1:], before[name])
    save_file({"emb_params": one}, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match=r"old.safetensors is made for 1 text encoder, SDXL has 2"):
        add_embeddings(model, [str(tmp_path / "old.safetensors")])


def test_the_same_word_twice_is_an_error(model, tmp_path):
    save_file({"emb_params": torch.zeros(1, 64)}, tmp_path / "mystyle.safetensors")
    with pytest.raises(UserError, match="vocabulary already"):
        add_embeddings(model, [str(tmp_path / "mystyle.safetensors")] * 2)


def test_a_file_in_a_folder_that_is_no_utf8(model, tmp_path, not_utf8):
    save_file({"emb_params": torch.zeros(2, 64)}, tmp_path / "mystyle.safetensors")
    (tmp_path / "mystyle.safetensors").rename(not_utf8 / "mystyle.safetensors")
    assert add_embeddings(model, [str(not_utf8 / "mystyle.safetensors")]) == ["mystyle"]
