"""The samplers by the names that users give, made from Diffusers' schedulers."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from library.errors import unknown

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from library.diffusion.process import NoiseProcess


class Sampler(NamedTuple):
    """A Diffusers scheduler class, its settings, and the A1111 web UI's name for it, which the PNG text of images has.

    A sampler that the web UI does not have gets a name of its own.
    """

    scheduler: str
    web_ui_name: str
    settings: dict[str, Any] = {}  # noqa: RUF012


# What a setting is for:
#   clip_sample=False        latents are not confined to -1..1, so clipping would spoil them (Diffusers' pipeline forbids it too)
#   set_alpha_to_one=False   the last step ends at the noise of timestep 0, which is how Stable Diffusion was set up
#   steps_offset=1           timesteps 1, 21, 41.. instead of 0, 20, 40..: as in the original implementation
#   skip_prk_steps=True      pseudo linear multistep without the Runge-Kutta start, which is what Stable Diffusion calls PNDM
#   final_sigmas_type        DPM-Solver (without ++) predicts noise and cannot step to a noise level of exactly 0
#   lower_order_final=True   the single-step solver of order 2 would else need an even number of steps
_OWN_NAMES = {
    "ddim": Sampler("DDIMScheduler", "DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "lms": Sampler("LMSDiscreteScheduler", "LMS"),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": Sampler("HeunDiscreteScheduler", "Heun", {"clip_sample": False}),
    "dpm_2": Sampler("KDPM2DiscreteScheduler", "DPM2"),
    "dpm_2_a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "dpmsolver": Sampler(
        "DPMSolverMultistepScheduler", "DPM-Solver 2M", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    ),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": Sampler(
        "DPMSolverSinglestepScheduler", "DPM-Solver++ 2S", {"algorithm_type": "dpmsolver++", "lower_order_final": True}
    ),
}
_OTHER_NAMES = ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")  # with "k_" before them
SAMPLERS: dict[str, Sampler] = _OWN_NAMES | {f"k_{name}": _OWN_NAMES[name] for name in _OTHER_NAMES}
# The type of options that name a sampler. Type checkers accept no Literal of a table's keys.
if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = Literal[tuple(SAMPLERS)]


def check_sampler(name: str, where: str = "") -> str:
    """Returns the name. Raises UserError, with the most similar known name, if there is no such sampler."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS, where)
    return name


def make_scheduler(name: str, process: NoiseProcess) -> SchedulerMixin:
    """A new Diffusers scheduler for the sampler `name` (one of `SAMPLERS`) with the noise schedule of a model.

    A setting that neither `SAMPLERS` nor the process has keeps the default of its class, so the scheduler equals
    `Class.from_config(pipeline.scheduler.config)` of the model's Diffusers pipeline. With zero terminal SNR sampling begins at
    the very last timestep.
    """
    sampler = SAMPLERS[check_sampler(name)]
    is_lms = sampler.scheduler == "LMSDiscreteScheduler"
    scheduler_class = _lms_without_scipy() if is_lms else _diffusers_class(sampler.scheduler)
    accepted = inspect.signature(scheduler_class).parameters
    settings = sampler.settings | {name: value for name, value in process.scheduler_config().items() if name in accepted}
    if process.zero_terminal_snr:
        settings |= _zero_terminal_snr_settings(scheduler_class, process)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*algorithm_type dpmsolver is deprecated", category=FutureWarning)
        return scheduler_class(**settings)


def _zero_terminal_snr_settings(scheduler_class: type, process: NoiseProcess) -> dict[str, Any]:
    """Settings that rescale the noise schedule to a signal-to-noise ratio of zero at its end (arXiv:2305.08891)."""
    accepted = inspect.signature(scheduler_class).parameters
    settings: dict[str, Any] = {"timestep_spacing": "trailing"} if "timestep_spacing" in accepted else {}
    if "rescale_betas_zero_snr" in accepted:
        return settings | {"rescale_betas_zero_snr": True}
    return settings | {"trained_betas": _rescaled_betas(process)}


def _rescaled_betas(process: NoiseProcess) -> list[float]:
    """The rescaled schedule for scheduler classes without `rescale_betas_zero_snr`.

    The last cumulative alpha is 2^-24 , as in Diffusers' Euler schedulers: 0 would make the first sigma infinite.
    """
    import torch
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(process.beta_start**0.5, process.beta_end**0.5, process.timesteps, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    alphas[-1] = 2**-24
    previous = torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
    return (1 - alphas / previous).tolist()


def _diffusers_class(name: str) -> type:
    import diffusers

    return getattr(diffusers, name)


def _lms_without_scipy() -> type:
    """Diffusers' `LMSDiscreteScheduler` without scipy, which it uses for this integral alone.

    scipy is a large package, and Diffusers and transformers import it at every start wherever it is installed.
    """
    from diffusers.schedulers.scheduling_lms_discrete import (
        LMSDiscreteScheduler,
    )  # diffusers exports it only if scipy is installed
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
