"""library/generation/pipeline/encoding.py: what the text encoder made of a prompt is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.generation.pipeline import encoding
from library.generation.pipeline.encoding import PromptCache
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.spec import PromptSpec

CAT = PromptSpec("a cat", "blurry", width=64, height=64, seed=7, steps=1)


@pytest.fixture
def encoded(monkeypatch):
    """The texts that reach the text encoder, call by call."""
    calls = []
    encode = encoding.encode_prompts
    monkeypatch.setattr(encoding, "encode_prompts", lambda sd, texts, *rest: calls.append(texts) or encode(sd, texts, *rest))
    return calls


def test_a_text_is_encoded_once_for_all_its_images(model, encoded):
    specs = [replace(CAT, seed=seed, prompt=prompt) for seed, prompt in enumerate(("a cat", "a dog", "a cat", "a bird", "a dog"))]
    pipeline = Pipeline(model, GenerateSettings(batch_size=2))
    assert len(list(pipeline.generate(specs))) == len(list(pipeline.generate(specs))) == 5
    assert encoded == [["blurry"], ["a cat", "a dog"], ["a bird"]]


def test_other_chunks_clip_skip_and_networks_need_another_encoding(model, encoded):
    texts = PromptCache()
    for chunks, clip_skip, state in ((1, None, ()), (2, None, ()), (1, 2, ()), (1, None, (("ink", 0.8),)), (1, None, ())):
        texts.encode(model, ["a cat"], chunks, clip_skip, state)
    assert len(encoded) == 4


def test_the_texts_used_last_are_kept(model, encoded):
    texts = PromptCache(capacity=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        rows = texts.encode(model, [text, text], 1)["context"]
        assert torch.equal(rows[0], rows[1])
    assert encoded == [["a"], ["b"], ["c"], ["b"]]
    assert len(texts.encode(model, ["a", "b", "c"], 1)) == 3


def test_negative_scale_reads_the_empty_prompt_too(model, latents_of, encoded):
    """e_0 + g (e_pos - e_0) - h (e_neg - e_0): with an empty negative prompt h has no effect."""
    plain, *scaled = latents_of(
        model, [replace(CAT, negative_prompt="", negative_scale=scale, steps=2) for scale in (None, 0.0, 5.0)], batch_size=2
    )
    for one in scaled:
        torch.testing.assert_close(one, plain, rtol=1e-3, atol=1e-3)
    low, high = latents_of(model, [replace(CAT, negative_scale=scale, steps=2) for scale in (0.0, 4.0)], batch_size=2)
    torch.testing.assert_close(low, plain, rtol=1e-3, atol=1e-3)
    assert (high - low).abs().max() > 0.05
