"""library/diffusion/samplers.py: the documented sampler names on Diffusers' schedulers."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings

import pytest
import torch

from library.diffusion.process import NoiseProcess
from library.diffusion.samplers import SAMPLERS, make_scheduler
from library.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy 2 about Diffusers' code, not ours

DOCUMENTED = [
    *("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle"),
    *("k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
]
# scheduler_config.json of Stable Diffusion 1.5
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "trained_betas": None, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False,
}  # fmt: skip


def test_the_documented_names():
    assert sorted(SAMPLERS) == sorted(DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_equals_the_scheduler_that_diffusers_makes_from_stable_diffusions_config(name):
    ours = make_scheduler(name, NoiseProcess())
    base = type(ours).__mro__[1] if "lms" in name else type(ours)  # ours only replaces how lms integrates
    extra = {"final_sigmas_type": "sigma_min", "algorithm_type": "dpmsolver"} if name == "dpmsolver" else {}
    extra |= {"lower_order_final": True} if name == "dpmsingle" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = base.from_config({**STABLE_DIFFUSION, **extra})
    for steps in (7, 30):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(torch.as_tensor(ours.timesteps), torch.as_tensor(theirs.timesteps))
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
        if hasattr(ours, "sigmas"):
            assert torch.equal(ours.sigmas, theirs.sigmas)
    for setting in ("prediction_type", "clip_sample", "set_alpha_to_one", "skip_prk_steps", "algorithm_type", "solver_order"):
        if setting in inspect.signature(base).parameters:
            assert ours.config[setting] == theirs.config[setting]


def test_trap_35_latents_are_not_clipped():
    """Their values leave -1..1, so a sampler that clips would spoil the image."""
    assert not any(make_scheduler(name, NoiseProcess()).config.get("clip_sample") for name in SAMPLERS)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_no_warning_reaches_the_user(name, recwarn):
    make_scheduler(name, NoiseProcess()).set_timesteps(5)
    shown = [
        str(warning.message) for warning in recwarn if not issubclass(warning.category, DeprecationWarning)
    ]  # as Python shows them
    assert shown == []


@pytest.mark.parametrize("name", DOCUMENTED)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_model_is_followed_to_the_image(name, prediction):
    """With a model that knows the image, every sampler arrives there: prediction type and noise levels fit together."""
    torch.manual_seed(0)
    image = torch.randn(1, 4, 8, 8) * 0.8
    for zero_snr in (False, True) if prediction == "v_prediction" else (False,):
        scheduler = make_scheduler(name, NoiseProcess("v" if prediction == "v_prediction" else "epsilon", zero_snr))
        scheduler.set_timesteps(20)
        sample = torch.randn(1, 4, 8, 8) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(sample, timestep)  # = alpha image + sigma noise
            alpha, sigma = _alpha_sigma(scheduler, timestep, noisy)
            noise = (noisy - alpha * image) / sigma
            predicted = noise if prediction == "epsilon" else alpha * noise - sigma * image
            sample = scheduler.step(predicted, timestep, sample, return_dict=False)[0]
        assert (sample - image).abs().max() < 0.15, f"zero_terminal_snr={zero_snr}"


def _alpha_sigma(scheduler, timestep, noisy):
    """Alpha and sigma of a timestep, as the scheduler itself has them: k-samplers may step between two training steps."""
    scaled = scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), timestep)  # 1 / sqrt(sigma^2 + 1), or untouched
    alpha = scaled if scaled < 1 else scheduler.alphas_cumprod[int(timestep)].double() ** 0.5
    return alpha.float(), ((1 - alpha**2) ** 0.5).float()


def test_trap_5_zero_terminal_snr_starts_at_the_last_timestep_in_pure_noise():
    for name in SAMPLERS:
        scheduler = make_scheduler(name, NoiseProcess("v", zero_terminal_snr=True))
        scheduler.set_timesteps(10)
        assert int(scheduler.timesteps[0]) == 999, name
        assert scheduler.alphas_cumprod[-1] < 1e-6, name
        assert scheduler.alphas_cumprod[0] == pytest.approx(1 - 0.00085, abs=1e-6), name


def test_lms_coefficients_equal_numerical_integration():
    """Values of diffusers 0.42's own LMSDiscreteScheduler, which integrates with scipy, at 8 steps."""
    scheduler = make_scheduler("lms", NoiseProcess())
    scheduler.set_timesteps(8)
    scipy = {
        (0, 1): [-7.936628818511963],
        (1, 2): [-3.783425785396126, 0.6274728953381273],
        (5, 4): [-0.5910918901647566, 0.32302303243300695, -0.09104091722374763, 0.007515697548700395],
        (7, 4): [-0.03115461518407055, 0.0034864963900486223, -0.0017812745963660338, 0.00028185783810814245],
    }
    for (t, order), expected in scipy.items():
        assert [scheduler.get_lms_coefficient(order, t, current) for current in range(order)] == pytest.approx(
            expected, rel=1e-6, abs=1e-9
        )


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="unknown sampler 'euler_b'; did you mean 'euler_a'"):
        make_scheduler("euler_b", NoiseProcess())


def test_importing_the_names_does_not_import_diffusers():
    code = "import sys, library.generation.prompts; sys.exit('diffusers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
