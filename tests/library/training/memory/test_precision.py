from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from library.models import sd1, sdxl
from library.testing import small_stable_diffusion
from library.training import setup
from library.training.checks.contradictions import contradictions
from library.training.memory.compiling import check_backend, compile_in_place, repeated_layers
from library.training.memory.precision import HalfGradScaler, NumberFormats, check_half_weights, explain_nonfinite, vae_cure
from library.training.options import parse_options
from tests.library.training.small_runs import image_folder, train, use_two_blocks, words_of_a_run

NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]
CPU = torch.device("cpu")


def options(*words: str):
    return parse_options([*NEEDED, *words])


def formats(*words: str) -> NumberFormats:
    chosen = options(*words)
    return NumberFormats.of(chosen.training, chosen.precision)


# ---------------------------------------------------------------- 16-bit weights


@pytest.mark.option("full_fp16", "full_bf16", "mixed_precision")
def test_trained_weights_are_float32_unless_full():
    assert formats("--mixed_precision=fp16").trained == torch.float32
    assert formats("--mixed_precision=fp16", "--full_fp16").trained == torch.float16
    assert formats("--mixed_precision=bf16", "--full_bf16").trained == torch.bfloat16


@pytest.mark.parametrize(
    "words, part",
    [
        (["--full_fp16"], "--full_fp16 needs --mixed_precision fp16"),
        (["--full_bf16", "--mixed_precision=fp16"], "--full_bf16 needs --mixed_precision bf16"),
        (["--full_bf16", "--full_fp16", "--mixed_precision=fp16"], "--full_bf16 needs"),
    ],
)
def test_full_precision_needs_the_arithmetic_of_its_kind(words, part):
    (problem,) = contradictions(options(*words))
    assert problem.startswith(part)


def step(eps: float, dtype: torch.dtype) -> torch.Tensor:
    """A weight of which half has no gradient after one step of AdamW."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, eps=eps)
    (weight[:4] * 0.01).sum().backward()
    check_half_weights(optimizer, "AdamW", dtype) if eps > 1e-7 else None
    optimizer.step()
    return weight.detach()


def test_adam_on_fp16_weights_would_make_nan_and_is_refused():
    assert step(1e-8, torch.float16).isnan().any(), "the trap is there"
    assert step(1e-8, torch.bfloat16).isfinite().all() and step(1e-4, torch.float16).isfinite().all()
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.float16))
    with pytest.raises(UserError, match="eps=1e-08 .* is 0 in fp16.*eps=1e-4"):
        check_half_weights(torch.optim.AdamW([weight]), "AdamW", torch.float16)
    check_half_weights(torch.optim.AdamW([weight]), "AdamW", torch.bfloat16)
    check_half_weights(torch.optim.SGD([weight]), "SGD", torch.float16)


def test_the_loss_scaler_takes_fp16_gradients():
    for scaler_class, works in ((torch.amp.GradScaler, False), (HalfGradScaler, True)):
        weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = scaler_class("cpu", init_scale=4.0)
        scaler.scale(weight.sum() * 0.25).backward()
        if not works:
            with pytest.raises(ValueError, match="FP16"):
                scaler.unscale_(optimizer)
            continue
        scaler.unscale_(optimizer)
        assert weight.grad.tolist() == [0.25] * 4
        scaler.step(optimizer)
        assert weight.tolist() == [0.75] * 4


@pytest.mark.option("no_half_vae")
def test_trap_24_a_loss_of_nan_is_explained():
    good, bad = [torch.ones(2)], [torch.ones(2), torch.tensor([1.0, float("nan")])]

    def explain(*words, weights=good, cure: str | None = "look at the VAE"):
        return explain_nonfinite(formats(*words), weights, cure)

    half = ["--mixed_precision=fp16"]
    assert "lower --learning_rate, or leave out --full_fp16" in explain(*half, "--full_fp16", weights=bad)
    assert explain(weights=bad).endswith("any more: lower --learning_rate")
    assert explain(*half).endswith("overflowed in fp16: use --mixed_precision bf16 or no; if it is the VAE, look at the VAE")
    assert explain(*half, cure=None).endswith("--mixed_precision bf16 or no") and "look at the images" in explain()
    assert "with --no_half_vae, or give another --vae" in vae_cure(formats(*half), False, sd1.FAMILY)
    named = vae_cure(formats(*half), False, sdxl.FAMILY)
    assert named.endswith("--no_half_vae, or give --vae=madebyollin/sdxl-vae-fp16-fix, which is made for 16 bits")
    assert vae_cure(formats(*half), True, sdxl.FAMILY) == vae_cure(formats(), False, sdxl.FAMILY)
    assert vae_cure(formats(), False, sdxl.FAMILY).startswith("it runs in full precision")


@pytest.mark.parametrize("words", [["--no_half_vae"], ["--cache_latents"], []])
def test_trap_24_the_vae_is_named_unless_it_is_exact_or_the_cache_has_looked_at_its_latents(words, tmp_path, monkeypatch):
    use_two_blocks(monkeypatch.setattr)
    monkeypatch.setattr(setup, "vae_cure", lambda *_: "look at the VAE")
    made = train(words_of_a_run(image_folder(tmp_path / "images", 1), tmp_path / "out", "--max_train_steps=1", *words))
    assert made.step.losses.explain.args[-1] == (None if words else "look at the VAE")


# ---------------------------------------------------------------- torch.compile


def test_a_compiled_module_does_the_same_and_keeps_its_names():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU())
    x, names = torch.randn(2, 4), list(module.state_dict())
    plain = module(x)
    check_backend("eager", CPU)
    compile_in_place([module], "eager")
    assert module._compiled_call_impl is not None
    torch.testing.assert_close(module(x), plain)
    assert list(module.state_dict()) == names


def test_the_layers_that_a_model_repeats_are_compiled():
    unet, encoder = small_stable_diffusion().denoiser, small_stable_diffusion().text_encoders[0]
    assert {type(layer).__name__ for layer in repeated_layers(unet)} == {"BasicTransformerBlock"}
    assert {type(layer).__name__ for layer in repeated_layers(encoder)} == {"CLIPEncoderLayer"}
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert repeated_layers(plain) == [plain]


@pytest.mark.parametrize(
    "name, part", [("inducter", "inductor"), ("nvprims_nvfuser", "not exist in torch any more"), ("xyz", "there are: ")]
)
def test_back_ends_that_are_not_there(name, part):
    with pytest.raises(UserError, match=part):
        check_backend(name, CPU)


def test_a_missing_compiler_is_one_line(monkeypatch):
    def broken(model, inputs):
        raise RuntimeError("\nno working C++ compiler\nmany\nlines")

    monkeypatch.setattr(torch._dynamo, "list_backends", lambda exclude: ["broken"])
    monkeypatch.setattr(torch, "compile", lambda function, backend: lambda x: broken(None, None))
    with pytest.raises(
        UserError, match=r"--torch_compile: broken cannot compile .*no working C\+\+ compiler.*aot_eager"
    ) as caught:
        check_backend("broken", CPU)
    assert "\n" not in str(caught.value)
