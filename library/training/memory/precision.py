"""Number formats of a run: which weights are kept how, and what goes wrong with 16 bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from library.devices import DTYPES
from library.errors import UserError
from library.models.family import Family
from library.training.optimization.optimizers import spec_of
from library.training.options import TrainNetworkOptions

LEAST_FP16 = 2.0**-24  # the smallest number above 0


def trained_dtype(options: TrainNetworkOptions) -> torch.dtype:
    """The format of the network's weights: float32, or that of the arithmetic with --full_fp16 and --full_bf16."""
    full = options.precision.full_fp16 or options.precision.full_bf16
    return DTYPES[options.training.mixed_precision] if full else torch.float32


class HalfGradScaler(torch.amp.GradScaler):
    """A loss scaler that also takes fp16 gradients, which those of fp16 weights are; torch's own refuses them."""

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def check_half_weights(optimizer: torch.optim.Optimizer, name: str, dtype: torch.dtype) -> None:
    """Refuse fp16 weights with an optimizer that would divide by zero at the first weight without a gradient.

    Adam and its kin add eps = 1e-8 to the root that they divide by. Computed in the weights' own format that is 0 in fp16. Those
    of bitsandbytes and AdaFactor compute in float32.
    """
    computes_in_float32 = spec_of(type(optimizer)).float32_math
    for group in optimizer.param_groups:
        eps = group.get("eps")
        if dtype == torch.float16 and not computes_in_float32 and isinstance(eps, float) and eps < LEAST_FP16 / 2:
            raise UserError(
                f"--full_fp16: {name} adds eps={eps:g} to what it divides by, which is 0 in fp16, so the first step would make "
                'NaN; give --optimizer_args "eps=1e-4", or --optimizer_type=AdamW8bit, or --full_bf16 with --mixed_precision=bf16'
            )


def explain_nonfinite(options: TrainNetworkOptions, weights: Iterable[torch.Tensor], family: Family) -> str:
    """Why a loss is NaN or infinite, as far as the network's weights tell."""
    training, precision = options.training, options.precision
    if not all(bool(torch.isfinite(weight).all()) for weight in weights):
        more = ", or leave out --full_fp16" if precision.full_fp16 else ""
        return f"the network's own weights are not finite any more: lower --learning_rate{more}"
    if training.mixed_precision == "fp16":
        is_checked = options.model.no_half_vae or options.augmentation.cache_latents or options.augmentation.cache_latents_to_disk
        vae = "" if is_checked else f"; if it is the VAE, {vae_cure(options, family)}"
        return f"the network's weights are good, so the model overflowed in fp16: use --mixed_precision bf16 or no{vae}"
    return "the network's weights are good: look at the images named above, and lower --learning_rate if they are good too"


def vae_cure(options: TrainNetworkOptions, family: Family) -> str:
    """What to do about a VAE that gives values that are not finite."""
    if options.training.mixed_precision == "no" or options.model.no_half_vae:
        return "it runs in full precision, so its file is damaged: use another --vae"
    other = f"--vae={family.half_vae}, which is made for 16 bits" if family.half_vae else "another --vae"
    return f"run it in full precision with --no_half_vae, or give {other}"
