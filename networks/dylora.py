"""DyLoRA: one training run, and afterwards a LoRA of any rank (Valipour et al. 2022, arXiv 2210.07558).

A step draws one rank b for the whole network, uniformly from unit, 2 unit, ..., R, and trains the first b ranks alone:

    y = W(x) + multiplier * (alpha / R) * up[:, :b] diag(gain[:b]) down[:b] x

So the first ranks learn to work without the others, and the others to add to them. All b ranks get gradients at such a step
(the paper's variant without "frozen"). The scale alpha / R is the same for every b: each rank then means the same whether
or not others follow it, so the ranks can agree. The paper divides by b instead, which asks the first ranks to be right both
at one strength and at R / unit times that: on the small model the losses ended 2 % (rank 4) to 20 % (rank 16) higher, and with
"frozen" 27 % and more (150 steps on the random base, one seed).

A rank that takes part in a share p of the steps learns more slowly, Adam's steps shrinking with the root of p; and the first
ones have to serve all the others. So their products have the gain sqrt(2 / p), which is this module's own (1 if there is but
one unit). With it the extracted ranks end -2.3 to +1.4 % from LoRAs of the same learning rate and number of steps, without it 5
to 11 % above them, on the random base; see benchmarks/results/dylora-seeded.md.

The file is an ordinary LoRA of rank R, up being multiplied with the gain. Its first b ranks with alpha * b / R are a LoRA of rank
b that does what the first b ranks did in training; extract_lora_from_dylora.py writes them. Evaluation and images use all ranks.

The trainer calls `on_step_start` before the first batch of every step. Without these calls all ranks train, as in a LoRA.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from library.files import read_safetensors_metadata
from networks import lora_args
from networks.lora import TextEncoders, UNet, Weights, weight_delta
from networks.lora_args import NetworkArgs
from networks.suite_module import SuiteModule
from networks.suite_network import SuiteNetwork

READERS = {
    "unit": lora_args.take_int,
    **{
        key: reader
        for key, reader in lora_args.readers().items()
        if key in ("conv_dim", "conv_alpha") or key.startswith("loraplus_")
    },
}


@dataclass(frozen=True)
class DyLoRAArgs(NetworkArgs):
    """The values of `--network_args` for a DyLoRA. None: not given."""

    unit: int | None = None


class DyLoRAModule(SuiteModule):
    """A LoRA module that in training uses its first `active_rank` ranks alone. `gain` (R,) is 1 until the network sets it."""

    gain: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.active_rank = self.rank
        self.register_buffer("gain", torch.ones(self.rank))

    def forward(self, x: Tensor) -> Tensor:
        """multiplier * scale * up[:, :b] diag(gain) down[:b] x, where b is `active_rank` in training, else the whole rank."""
        (down, up, factor), layer = self.factors(), self.lora_down
        x = self.in_own_type(x)
        if isinstance(layer, nn.Conv2d):
            hidden = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
            return F.conv2d(hidden * factor[:, None, None].to(hidden.dtype), up)
        hidden = F.linear(x, down)
        return F.linear(hidden * factor.to(hidden.dtype), up)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        rank = self.active_rank if self.training else self.rank
        return self.lora_down.weight[:rank], self.lora_up.weight[:, :rank], self.gain[:rank] * (self.scale * self.multiplier)

    def product_norm(self) -> Tensor:
        return weight_delta(self._with_gain(), self.lora_down.weight, self.scale * self.rank).norm()

    def file_weights(self) -> dict[str, Tensor]:
        weights = {key: tensor for key, tensor in super().file_weights().items() if key != "gain"}
        return weights | {"lora_up.weight": self._with_gain().detach()}

    def from_file(self, weights: Weights) -> dict[str, Tensor]:
        if f"{self.lora_name}.gain" in weights:  # a state of this network, not a file
            return {key: weights[f"{self.lora_name}.{key}"] for key in self.state_dict()}
        fitted = super().from_file(weights)
        up = fitted["lora_up.weight"].float()
        return fitted | {"lora_up.weight": up / self.gain.to(up.device).view(1, -1, *[1] * (up.dim() - 2)), "gain": self.gain}

    def _with_gain(self) -> Tensor:
        up = self.lora_up.weight
        return up * self.gain.view(1, -1, *[1] * (up.dim() - 2))


class DyLoRANetwork(SuiteNetwork):
    """LoRA modules of one rank R. Each step trains the first `unit`, 2 `unit`, ... or R ranks."""

    module_class = DyLoRAModule
    args: DyLoRAArgs

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if other := next((m for m in self.loras if not isinstance(m, DyLoRAModule)), None):
            raise ValueError(f"{other.lora_name} is no plain LoRA in these weights; use networks.lora")
        ranks = sorted({module.rank for module in self.loras})
        if len(ranks) > 1:
            raise ValueError(f"a DyLoRA has one rank, these weights have {', '.join(map(str, ranks))}; use networks.lora")
        self.rank, self.unit = ranks[0], 1 if self.args.unit is None else self.args.unit
        check_unit(self.unit, self.rank)
        for module in self.loras:
            module.gain.copy_(gains(self.rank, self.unit))

    @property
    def loras(self) -> Sequence[DyLoRAModule]:
        return list(self.children())  # type: ignore[arg-type]

    def on_step_start(self, text_encoder: TextEncoders = None, unet: UNet = None) -> None:
        """Draw the rank of this step from torch's CPU generator, the same for every module and until the next call."""
        self.use_rank(self.unit * (1 + int(torch.randint(self.rank // self.unit, ()))))

    def use_rank(self, rank: int) -> None:
        """Train the first `rank` ranks from now on."""
        for module in self.loras:
            module.active_rank = rank


def gains(rank: int, unit: int) -> Tensor:
    """The gain of each rank: sqrt(2 / the share of the steps that train it), (rank,); 1 if every step trains all."""
    if unit == rank:
        return torch.ones(rank)
    units = rank // unit
    share = (units - torch.arange(units)) / units
    return (2 / share).sqrt().repeat_interleave(unit)


def check_unit(unit: int, rank: int) -> None:
    """ValueError unless the rank is a multiple of the unit."""
    if unit < 1 or rank % unit:
        fitting = [n for n in range(1, rank + 1) if rank % n == 0]
        raise ValueError(f"network_args unit={unit} does not divide the rank {rank}; give one of {', '.join(map(str, fitting))}")


def parse_network_args(texts: Mapping[str, Any], neuron_dropout: float | None = None) -> DyLoRAArgs:
    """Read and check the words of `--network_args`; those that only networks.lora has are errors that name them."""
    for key, text in {**texts, "--network_dropout": neuron_dropout}.items():
        if text is not None and key not in READERS and (key in lora_args.readers() or key.startswith("--")):
            word = key if key.startswith("--") else f"network_args {key}"
            raise ValueError(f"{word}: a DyLoRA has no such thing; leave it out, or use --network_module=networks.lora")
    return lora_args.parse_network_args(texts, known=READERS, kind=DyLoRAArgs)  # type: ignore[return-value]


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: TextEncoders,
    unet: UNet,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> DyLoRANetwork:
    """A new DyLoRA of rank network_dim (default 4); network_args may have unit (default 1), conv_dim (which must equal the rank),
    conv_alpha and the LoRA+ ratios. Wrong ones raise ValueError."""
    args = parse_network_args(network_args, neuron_dropout)
    dim = 4 if network_dim is None else network_dim
    if args.conv_dim not in (None, dim):
        raise ValueError(f"network_args conv_dim={args.conv_dim}: a DyLoRA has one rank, give conv_dim={dim} (= --network_dim)")
    return DyLoRANetwork.create(args, multiplier, dim, network_alpha, text_encoder, unet)


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike | None,
    vae: Any,
    text_encoder: TextEncoders,
    unet: UNet,
    weights_sd: dict[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> tuple[DyLoRANetwork, dict[str, Tensor]]:
    """A DyLoRA with the modules, rank and alphas of a LoRA file, or of weights_sd, and these weights, not yet loaded into it.

    The unit is that of network_args, or else the one in the file's metadata, or else 1.
    """
    if "unit" not in network_args and file is not None:
        network_args["unit"] = unit_of_file(file)
    args = parse_network_args(network_args, neuron_dropout)
    weights = DyLoRANetwork.read(file) if weights_sd is None else weights_sd  # type: ignore[arg-type] # one of them is given
    network = DyLoRANetwork.from_weights(args, multiplier, weights, text_encoder, unet)
    return network, network.own_weights(weights)


def unit_of_file(file: str | os.PathLike) -> str | None:
    """The unit with which a file was trained, as its metadata has it; None if it has none."""
    if Path(file).suffix != ".safetensors" or not Path(file).is_file():
        return None
    try:
        words = json.loads(read_safetensors_metadata(file).get("ss_network_args", "{}"))
    except (UserError, ValueError, RecursionError):
        return None  # a damaged file is reported where it is loaded
    return words.get("unit") if isinstance(words, dict) else None
