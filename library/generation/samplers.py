"""The samplers that users name, on Diffusers' schedulers."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from library.errors import unknown

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# name: (class in diffusers, settings beside those of Stable Diffusion). What a setting is for:
#   clip_sample=False        latents are not confined to -1..1, so clipping would spoil them (Diffusers' pipeline forbids it too)
#   set_alpha_to_one=False   the last step ends at the noise of timestep 0, which is how Stable Diffusion was set up
#   steps_offset=1           timesteps 1, 21, 41.. instead of 0, 20, 40..: as in the original implementation
#   skip_prk_steps=True      pseudo linear multistep without the Runge-Kutta start, which is what Stable Diffusion calls PNDM
#   final_sigmas_type        DPM-Solver (without ++) predicts noise and cannot step to a noise level of exactly 0
#   lower_order_final=True   the single-step solver of order 2 would else need an even number of steps
_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "lower_order_final": True}),
}
_SAME = {f"k_{name}": name for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}
SAMPLERS = (*_SAMPLERS, *_SAME)

TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def check_sampler(name: str, where: str = "") -> str:
    """The name itself, or a `UserError` that names the nearest known one."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS, where)
    return name


def make_scheduler(name: str, *, v_parameterization: bool = False, zero_terminal_snr: bool = False) -> SchedulerMixin:
    """A fresh Diffusers scheduler for the sampler `name` (one of `SAMPLERS`) on Stable Diffusion's noise schedule.

    The schedule is 1000 steps of scaled linear beta from 0.00085 to 0.012. What is not set here stays as the class has it, so the
    scheduler equals `Class.from_config(pipeline.scheduler.config)` of a Diffusers pipeline of Stable Diffusion.
    With `zero_terminal_snr` the schedule ends in pure noise and sampling begins at its very last timestep.
    """
    name = check_sampler(name)
    class_name, settings = _SAMPLERS[_SAME.get(name, name)]
    scheduler_class = _lms_without_scipy() if class_name == "LMSDiscreteScheduler" else _diffusers_class(class_name)
    settings = {
        "num_train_timesteps": TRAIN_TIMESTEPS, "beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction" if v_parameterization else "epsilon", **settings,
    }  # fmt: skip
    if zero_terminal_snr:
        settings |= _zero_terminal_snr_settings(scheduler_class)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*algorithm_type dpmsolver is deprecated", category=FutureWarning)
        return scheduler_class(**settings)


def _zero_terminal_snr_settings(scheduler_class: type) -> dict[str, Any]:
    """Settings that rescale the noise schedule to a signal-to-noise ratio of zero at its end (arXiv:2305.08891)."""
    accepted = inspect.signature(scheduler_class.__init__).parameters
    settings: dict[str, Any] = {"timestep_spacing": "trailing"} if "timestep_spacing" in accepted else {}
    if "rescale_betas_zero_snr" in accepted:
        return settings | {"rescale_betas_zero_snr": True}
    return settings | {"trained_betas": _rescaled_betas()}


def _rescaled_betas() -> list[float]:
    """The rescaled schedule for classes that cannot rescale by themselves.

    The last cumulative alpha is 2^-24 instead of 0, as in Diffusers' Euler schedulers: with 0 the first sigma would be infinite.
    """
    import torch
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    alphas[-1] = 2**-24
    previous = torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
    return (1 - alphas / previous).tolist()


def _diffusers_class(name: str) -> type:
    import diffusers

    return getattr(diffusers, name)


def _lms_without_scipy() -> type:
    """Diffusers' `LMSDiscreteScheduler`, which would use scipy for nothing but this integral.

    scipy is a large package, and Diffusers and transformers import it at every start wherever it is installed.
    """
    from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler  # diffusers itself only shows it where scipy is
    from numpy.polynomial import Polynomial

    class ExactLMSDiscreteScheduler(LMSDiscreteScheduler):
        def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
            """Integral from sigma_t to sigma_(t+1) of one Lagrange polynomial.

            Among the `order` latest sigmas it is 1 at sigma_(t - current_order) and 0 at the others.
            """
            sigmas = self.sigmas.double().tolist()
            others = [sigmas[t - k] for k in range(order) if k != current_order]
            basis = Polynomial([1.0])
            for sigma in others:
                basis *= Polynomial([-sigma, 1.0]) / (sigmas[t - current_order] - sigma)
            area = basis.integ()
            return float(area(sigmas[t + 1]) - area(sigmas[t]))

    return ExactLMSDiscreteScheduler
