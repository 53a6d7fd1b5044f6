"""Number formats of a run, and what goes wrong with 16 bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from library.devices import DTYPES
from library.errors import UserError
from library.models.family import Family
from library.training.optimization.optimizers import spec_of
from library.training.options import PrecisionOptions, TrainingOptions

LEAST_FP16 = 2.0**-24  # the smallest number above 0


@dataclass(frozen=True)
class NumberFormats:
    """In which formats a run keeps its numbers.

    arithmetic: the frozen model, and what is computed. trained: the network's weights. unet, text_encoder: the name of the format
    in which the large weights of these are packed (see packing.py); None: as the frozen model is.
    """

    arithmetic: torch.dtype
    trained: torch.dtype
    unet: str | None
    text_encoder: str | None

    @classmethod
    def of(cls, training: TrainingOptions, precision: PrecisionOptions) -> NumberFormats:
        """By --mixed_precision, --full_fp16, --full_bf16, --base_dtype, --fp8_base and --fp8_base_unet."""
        arithmetic = DTYPES[training.mixed_precision]
        both = precision.base_dtype or ("fp8" if precision.fp8_base else None)
        return cls(
            arithmetic=arithmetic,
            trained=arithmetic if precision.full_fp16 or precision.full_bf16 else torch.float32,
            unet=both or ("fp8" if precision.fp8_base_unet else None),
            text_encoder=both,
        )


class HalfGradScaler(torch.amp.GradScaler):
    """A loss scaler that also takes fp16 gradients, which those of fp16 weights are; torch's own refuses them."""

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def check_half_weights(optimizer: torch.optim.Optimizer, name: str, dtype: torch.dtype) -> None:
    """Refuse fp16 weights with an optimizer that would divide by zero at the first weight without a gradient.

    Adam and similar optimizers add eps = 1e-8 to the root that they divide by. Computed in the weights' own format that is 0 in
    fp16. Those of bitsandbytes and AdaFactor compute in float32.
    """
    computes_in_float32 = spec_of(type(optimizer)).float32_math
    for group in optimizer.param_groups:
        eps = group.get("eps")
        if dtype == torch.float16 and not computes_in_float32 and isinstance(eps, float) and eps < LEAST_FP16 / 2:
            raise UserError(
                f"--full_fp16: {name} adds eps={eps:g} to what it divides by, which is 0 in fp16, so the first step would make "
                'NaN; give --optimizer_args "eps=1e-4", or --optimizer_type=AdamW8bit, or --full_bf16 with --mixed_precision=bf16'
            )


def explain_nonfinite(formats: NumberFormats, weights: Iterable[torch.Tensor], vae_cure: str | None) -> str:
    """Why a loss is NaN or infinite, as far as the network's weights show it. vae_cure: None if it cannot be the VAE."""
    if not all(bool(torch.isfinite(weight).all()) for weight in weights):
        more = ", or leave out --full_fp16" if formats.trained == torch.float16 else ""
        return f"the network's own weights are not finite any more: lower --learning_rate{more}"
    if formats.arithmetic == torch.float16:
        vae = f"; if it is the VAE, {vae_cure}" if vae_cure else ""
        return f"the network's weights are good, so the model overflowed in fp16: use --mixed_precision bf16 or no{vae}"
    return "the network's weights are good: look at the images named above, and lower --learning_rate if they are good too"


def vae_cure(formats: NumberFormats, no_half_vae: bool, family: Family) -> str:
    """What to do about a VAE that gives values that are not finite."""
    if formats.arithmetic == torch.float32 or no_half_vae:
        return "it runs in full precision, so its file is damaged: use another --vae"
    other = f"--vae={family.half_vae}, which is made for 16 bits" if family.half_vae else "another --vae"
    return f"run it in full precision with --no_half_vae, or give {other}"
