"""library/generation/extras/embeddings.py: textual inversion."""

from __future__ import annotations

import pytest
import torch
from reference_pipelines import SMALL
from safetensors.torch import save_file

from library.errors import UserError
from library.generation.extras.embeddings import add_embeddings
from library.models.clip import encode_text, token_chunks
from library.testing import small_stable_diffusion


@pytest.fixture
def model():
    return small_stable_diffusion(seed=0, **SMALL)


def ids_of(model, prompt):
    ids, weights = token_chunks(model.tokenizers[0], [prompt], None)
    return [token for token in ids.flatten().tolist() if token < 49406 or token > 49407], weights


def test_words_become_their_vectors_and_everything_else_stays(model, tmp_path):
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


def test_the_same_word_twice_is_an_error(model, tmp_path):
    save_file({"emb_params": torch.zeros(1, 64)}, tmp_path / "mystyle.safetensors")
    with pytest.raises(UserError, match="vocabulary already"):
        add_embeddings(model, [str(tmp_path / "mystyle.safetensors")] * 2)
