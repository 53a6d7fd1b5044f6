"""The loss against the same formulas in float64 NumPy, and by what each option is for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from library.diffusion.loss import Objective
from library.diffusion.process import NoiseProcess
from library.errors import UserError
from library.training.checks.contradictions import contradictions
from library.training.options import LossOptions, TrainNetworkOptions, parse_options

CPU = torch.device("cpu")
NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]


def alphas(zero_terminal: bool = False) -> np.ndarray:
    a = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    roots = np.sqrt(a)
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 if zero_terminal else a


def options(*words: str) -> TrainNetworkOptions:
    return parse_options([*NEEDED, *words])


def objective(*words: str) -> Objective:
    chosen = options(*words)
    prediction = "v" if chosen.model.v_parameterization else "epsilon"
    return Objective(chosen.loss, NoiseProcess(prediction, chosen.loss.zero_terminal_snr), CPU)


@pytest.fixture
def case():
    """Latents, timesteps and a model's answer."""
    generator = torch.Generator().manual_seed(3)
    z, answer = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    return z, torch.tensor([0, 120, 500, 900, 999]), answer


def losses(case, *words: str, masks: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ours, and the squared errors (B, C, H, W) in float64 on the same noise."""
    z, t, answer = case
    torch.manual_seed(11)
    chosen = objective(*words)
    sample = chosen.sample(z, t)
    torch.manual_seed(11)
    e, z64 = torch.randn(z.shape).double().numpy(), z.double().numpy()
    a = alphas("--zero_terminal_snr" in words)[t.numpy()].reshape(-1, 1, 1, 1)
    wanted = np.sqrt(a) * e - np.sqrt(1 - a) * z64 if "--v_parameterization" in words else e
    return chosen.losses(answer, sample, masks).double().numpy(), answer.double().numpy() - wanted


def mean(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=(1, 2, 3))


@pytest.mark.option("v_parameterization", "zero_terminal_snr")
@pytest.mark.parametrize("words", [[], ["--v_parameterization"], ["--v_parameterization", "--zero_terminal_snr"]])
def test_mean_square_of_noise_and_velocity(case, words):
    ours, d = losses(case, *words)
    np.testing.assert_allclose(ours, mean(d**2), rtol=1e-4)


def test_input_is_the_noisy_latent_and_its_perturbation_stays_out_of_the_target(case):
    z, t, _ = case
    samples = {}
    for words in ((), ("--ip_noise_gamma=0.5",)):
        torch.manual_seed(2)
        samples[words] = objective(*words).sample(z, t)
    plain, perturbed = samples.values()
    assert torch.equal(plain.target, perturbed.target)
    a = torch.from_numpy(alphas())[t].view(-1, 1, 1, 1)
    torch.manual_seed(2)
    e, n = torch.randn(z.shape).double(), torch.randn(z.shape).double()
    torch.testing.assert_close(plain.latents.double(), a.sqrt() * z + (1 - a).sqrt() * e, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(perturbed.latents.double(), a.sqrt() * z + (1 - a).sqrt() * (e + 0.5 * n), rtol=1e-4, atol=1e-5)


def width(kind: str, t: np.ndarray, c: float, scale: float) -> np.ndarray:
    a = alphas()[t]
    widths = {
        "constant": np.full(len(t), c),
        "exponential": np.exp(math.log(c) * t / 1000),
        "snr": (1 - c) / (1 + np.sqrt((1 - a) / a)) ** 2 + c,
    }
    return (widths[kind] * scale).reshape(-1, 1, 1, 1)


@pytest.mark.option("loss_type", "huber_schedule", "huber_c", "huber_scale")
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_trap_5_7_huber_losses_with_each_schedule_and_scale(case, kind, schedule):
    ours, d = losses(case, f"--loss_type={kind}", f"--huber_schedule={schedule}", "--huber_c=0.2", "--huber_scale=1.7")
    c = width(schedule, case[1].numpy(), 0.2, 1.7)
    bent = 2 * (np.sqrt(d**2 + c**2) - c)
    np.testing.assert_allclose(ours, mean(bent * c if kind == "huber" else bent), rtol=1e-4)


def test_l1_and_the_limits_of_huber(case):
    ours, d = losses(case, "--loss_type=l1")
    np.testing.assert_allclose(ours, mean(np.abs(d)), rtol=1e-5)
    wide, d = losses(case, "--loss_type=huber", "--huber_schedule=constant", "--huber_c=1e4")
    np.testing.assert_allclose(wide, mean(d**2), rtol=1e-3)  # far within the bend it is the square
    narrow, d = losses(case, "--loss_type=smooth_l1", "--huber_schedule=constant", "--huber_c=1e-6")
    np.testing.assert_allclose(narrow, 2 * mean(np.abs(d)), rtol=1e-3)  # far beyond it the magnitude


def snr(t: np.ndarray, zero_terminal: bool = False) -> np.ndarray:
    a = alphas(zero_terminal)[t]
    return a / (1 - a)


WEIGHTINGS = [
    (["--min_snr_gamma=5"], lambda s: np.minimum(s, 5) / s),
    (["--min_snr_gamma=5", "--v_parameterization"], lambda s: np.minimum(s, 5) / (s + 1)),
    (["--debiased_estimation_loss"], lambda s: 1 / np.sqrt(np.minimum(s, 1000))),
    (["--debiased_estimation_loss", "--v_parameterization"], lambda s: 1 / (np.minimum(s, 1000) + 1)),
    (["--scale_v_pred_loss_like_noise_pred", "--v_parameterization"], lambda s: np.minimum(s, 1000) / (np.minimum(s, 1000) + 1)),
    (["--v_pred_like_loss=0.3"], lambda s: 1 + 0.3 * (np.minimum(s, 1000) + 1) / np.minimum(s, 1000)),
    (["--min_snr_gamma=1", "--debiased_estimation_loss"], lambda s: np.minimum(s, 1) / s / np.sqrt(np.minimum(s, 1000))),
]


@pytest.mark.option("min_snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss")
@pytest.mark.parametrize("words, weight", WEIGHTINGS, ids=[" ".join(words) for words, _ in WEIGHTINGS])
def test_weightings_against_the_formulas(case, words, weight):
    ours, d = losses(case, *words)
    np.testing.assert_allclose(ours, mean(d**2) * weight(snr(case[1].numpy())), rtol=3e-4)


@pytest.mark.parametrize("words, weight", [w for w in WEIGHTINGS if "--v_parameterization" in w[0]] + WEIGHTINGS[:1])
def test_trap_5_6_and_4_weights_are_those_of_the_rescaled_schedule(case, words, weight):
    ours, d = losses(case, *words, "--zero_terminal_snr")
    s = snr(case[1].numpy(), zero_terminal=True)
    with np.errstate(invalid="ignore"):
        wanted = np.where(s == 0, 1.0 if words == ["--min_snr_gamma=5"] else weight(s), weight(s))
    np.testing.assert_allclose(ours, mean(d**2) * wanted, rtol=3e-4)
    assert np.isfinite(ours).all() and s[-1] == 0


def test_min_snr_holds_down_easy_timesteps_only():
    weights = objective("--min_snr_gamma=5").weights
    easy = torch.from_numpy(snr(np.arange(1000)) > 5)
    assert (weights[~easy] == 1).all() and (weights[easy] < 1).all() and torch.equal(weights, weights.sort().values)
    assert torch.equal(objective("--min_snr_gamma=0").weights, torch.ones(1000))  # 0 as front ends write it: off


def test_masks_multiply_errors_and_do_not_change_the_mean_s_size(case):
    masks = torch.zeros(5, 1, 8, 8)
    masks[:, :, :, 4:] = 0.5
    ours, d = losses(case, masks=masks)
    np.testing.assert_allclose(ours, mean(d**2 * masks.double().numpy()), rtol=1e-4)
    z, t, answer = case
    torch.manual_seed(0)
    sample = objective().sample(z, t)
    answer.requires_grad_(True)
    objective().losses(answer, sample, masks).sum().backward()
    assert not answer.grad[..., :4].any() and answer.grad[..., 4:].any()


@pytest.mark.option("min_timestep", "max_timestep")
def test_min_and_max_timestep():
    torch.manual_seed(0)
    z = torch.zeros(20_000, 1, 1, 1)
    t = objective("--min_timestep=300", "--max_timestep=400").sample(z).t
    assert (t.min(), t.max()) == (300, 399)
    assert objective("--min_timestep=7", "--max_timestep=8").sample(z).t.unique().tolist() == [7]


@pytest.mark.parametrize(
    "words, part",
    [
        (["--noise_offset_random_strength"], "needs --noise_offset"),
        (["--adaptive_noise_scale=0.1"], "needs --noise_offset"),
        (["--ip_noise_gamma_random_strength"], "needs --ip_noise_gamma"),
        (["--min_timestep=500", "--max_timestep=500"], "--max_timestep 501"),
        (["--scale_v_pred_loss_like_noise_pred"], "needs --v_parameterization"),
        (["--v_pred_like_loss=1", "--v_parameterization"], "leave it out"),
        (["--zero_terminal_snr", "--debiased_estimation_loss"], "infinite"),
    ],
)
def test_what_does_not_fit_together_is_reported(words, part):
    (problem,) = contradictions(options(*words))
    assert part in problem


@pytest.mark.parametrize("word, part", [("--max_timestep=1001", "1000"), ("--loss_type=l3", "huber"), ("--huber_c=0", "huber_c")])
def test_values_that_cannot_be_are_refused(word, part):
    with pytest.raises(UserError, match=part):
        options(word)


def test_front_ends_write_zeros_for_what_is_off():
    words = [
        "--noise_offset=0",
        "--adaptive_noise_scale=0",
        "--multires_noise_iterations=0",
        "--ip_noise_gamma=0",
        "--v_pred_like_loss=0",
    ]
    z = torch.zeros(2, 4, 8, 8)
    torch.manual_seed(0)
    plain = torch.randn(z.shape)
    torch.manual_seed(0)
    assert torch.equal(objective(*words).sample(z).target, plain)
    assert LossOptions().multires_noise_discount == 0.3
