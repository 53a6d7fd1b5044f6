from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from library.models.clip import (
    apply_weights,
    count_chunks,
    count_tokens,
    encode_text,
    inner_text_model,
    load_tokenizer,
    token_chunks,
    tokenize,
)

BEGIN, END = 49406, 49407


def tokenize_weighted(tokenizer, captions, max_token_length=None):
    tokens = tokenize([tokenizer], captions, max_token_length, weighted=True)
    return tokens["ids"], tokens["weights"]


@pytest.fixture(scope="module")
def tokenizers():
    return {v2: load_tokenizer(padding) for v2, padding in ((False, "<|endoftext|>"), (True, "!"))}


def test_known_ids(tokenizers):
    for v2, padding in ((False, END), (True, 0)):
        ids = tokenize([tokenizers[v2]], ["a photo of a cat", ""])["ids"]
        assert ids.shape == (2, 1, 77) and ids.dtype == torch.int64
        assert ids[0, 0].tolist() == [BEGIN, 320, 1125, 539, 320, 2368, END] + [padding] * 70
        assert ids[1, 0].tolist() == [BEGIN, END] + [padding] * 75


def test_exclamation_mark_is_text_though_sd2_pads_with_it(tokenizers):
    assert tokenize([tokenizers[True]], ["a cat!"])["ids"][0, 0, :5].tolist() == [BEGIN, 320, 2368, 256, END]


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("words", [0, 1, 74, 75, 76, 149, 150, 151, 225, 300])
@pytest.mark.parametrize("length", [None, 75, 150, 225])
def test_chunks_of_75_each_wrapped(tokenizers, v2, words, length):
    tokenizer = tokenizers[v2]
    ids = tokenize([tokenizer], ["cat " * words], length)["ids"]
    chunks = (length or 75) // 75
    assert ids.shape == (1, chunks, 77)
    left = min(words, 75 * chunks)
    for chunk in ids[0].tolist():
        here = min(left, 75)
        assert chunk == [BEGIN] + [2368] * here + [END] + [tokenizer.pad_token_id] * (75 - here)
        left -= here


def test_count_tokens(tokenizers):
    assert count_tokens(tokenizers[False], "cat " * 100) == 100
    assert count_tokens(tokenizers[False], "(cat:1.2) cat", weighted=True) == 2
    assert count_chunks(tokenizers[False], "cat " * 76) == 2
    assert count_chunks(tokenizers[False], "") == 1


@pytest.mark.parametrize("length", [0, 74, 100, -75])
def test_other_lengths_are_refused(tokenizers, length):
    with pytest.raises(UserError, match="75, 150 or 225"):
        tokenize([tokenizers[False]], ["a"], length)["ids"]


def test_weights_follow_their_tokens(tokenizers):
    ids, weights = tokenize_weighted(tokenizers[False], ["a (photo of:1.5) [cat]"])
    assert ids[0, 0, :6].tolist() == [BEGIN, 320, 1125, 539, 2368, END]
    assert weights.dtype == torch.float32
    assert weights[0, 0, :7].tolist() == pytest.approx([1, 1, 1.5, 1.5, 1 / 1.1, 1, 1])


def test_text_without_brackets_is_tokenised_as_plain_text(tokenizers):
    captions = ["a photo of a cat, it's 3pm!", "cat " * 200, ""]
    ids, weights = tokenize_weighted(tokenizers[True], captions, 150)
    assert torch.equal(ids, tokenize([tokenizers[True]], captions, 150)["ids"])
    assert (weights == 1).all()


def test_break_starts_a_chunk_and_prompts_do_not_change_each_other(tokenizers):
    ids, weights = token_chunks(tokenizers[False], ["cat BREAK (photo:2)", "cat"], None)
    assert ids.shape == (2, 2, 77)
    assert ids[0, :, :3].tolist() == [[BEGIN, 2368, END], [BEGIN, 1125, END]]
    assert weights[0, 1, 1] == 2
    assert torch.equal(token_chunks(tokenizers[False], ["cat"], chunks=2)[0][0], ids[1])
    assert token_chunks(tokenizers[False], ["cat " * 75 + "BREAK cat"], None)[0].shape == (1, 2, 77)


@pytest.mark.parametrize("v2", [False, True])
def test_long_text_is_joined_from_its_chunks(small_models, v2):
    model = small_models[v2]
    ids = tokenize(model.tokenizers, ["cat photo " * 60], 225)["ids"]
    joined = encode_text(model.text_encoders[0], ids)
    assert joined.shape == (1, 227, 64)
    separate = [encode_text(model.text_encoders[0], ids[:, index : index + 1])[0] for index in range(3)]
    expected = torch.cat([separate[0][:1], *(chunk[1:-1] for chunk in separate), separate[2][-1:]])
    torch.testing.assert_close(joined[0], expected)


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_is_the_layer_from_the_end_then_the_final_norm(small_models, skip):
    model = small_models[False]
    ids = tokenize(model.tokenizers, ["a photo of a cat"])["ids"]
    inner = inner_text_model(model.text_encoders[0])
    seen = {}
    hook = inner.encoder.layers[-skip].register_forward_hook(
        lambda module, inputs, output: seen.update(value=output[0] if isinstance(output, tuple) else output)
    )
    encoded = encode_text(model.text_encoders[0], ids, clip_skip=skip)
    hook.remove()
    torch.testing.assert_close(encoded, inner.final_layer_norm(seen["value"]))
    if skip == 1:
        assert torch.equal(encoded, encode_text(model.text_encoders[0], ids))


def test_clip_skip_beyond_the_layers_is_refused(small_models):
    model = small_models[False]
    with pytest.raises(UserError, match="2 layers"):
        encode_text(model.text_encoders[0], tokenize(model.tokenizers, ["a"])["ids"], clip_skip=3)


@pytest.mark.parametrize("clip_skip", [None, 2])
def test_weights_of_one_change_nothing_bit_for_bit(small_models, clip_skip):
    model = small_models[False]
    ids = tokenize(model.tokenizers, ["a photo of a cat", "b"], 150)["ids"]
    plain = encode_text(model.text_encoders[0], ids, clip_skip)
    assert torch.equal(plain, encode_text(model.text_encoders[0], ids, clip_skip, torch.ones(ids.shape)))


def test_equal_weights_of_any_size_change_nothing():
    torch.manual_seed(0)
    embeddings = torch.randn(2, 77, 16)
    assert torch.equal(apply_weights(embeddings, torch.full((2, 77, 1), 1.3)), embeddings)


def test_weights_multiply_and_keep_the_mean():
    torch.manual_seed(0)
    embeddings = torch.randn(2, 77, 16) + 0.1
    weights = torch.ones(2, 77, 1)
    weights[0, 3] = 1.5
    weighted = apply_weights(embeddings, weights)
    assert torch.equal(weighted[1], embeddings[1])
    torch.testing.assert_close(weighted[0].mean(), embeddings[0].mean())
    ratio = weighted[0, 0, 0] / embeddings[0, 0, 0]
    torch.testing.assert_close(weighted[0, 3], embeddings[0, 3] * 1.5 * ratio)
    assert apply_weights(torch.zeros(1, 77, 4), weights[:1]).isfinite().all()


def test_trap_4_20_weighted_captions_obey_clip_skip(small_models):
    model = small_models[False]
    ids, weights = tokenize_weighted(model.tokenizers[0], ["a (cat:1.4) here"])
    with_skip = encode_text(model.text_encoders[0], ids, 2, weights)
    assert not torch.allclose(with_skip, encode_text(model.text_encoders[0], ids, None, weights))
    expected = apply_weights(encode_text(model.text_encoders[0], ids, 2), weights[:, 0, :, None])
    torch.testing.assert_close(with_skip, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("clip_skip", [None, 2])
def test_gradients_reach_the_text_encoder(checkpointing, clip_skip):
    from library.testing import small_stable_diffusion

    model = small_stable_diffusion()
    encoder = model.text_encoders[0].requires_grad_(True).train()
    if checkpointing:
        encoder.gradient_checkpointing_enable()
    ids, weights = tokenize_weighted(model.tokenizers[0], ["a (cat:1.4) here"])
    encode_text(encoder, ids, clip_skip, weights).square().sum().backward()
    gradients = [layer.mlp.fc1.weight.grad for layer in inner_text_model(encoder).encoder.layers]
    assert gradients[0].abs().sum() > 0
    assert (gradients[1] is None) == (clip_skip == 2)
