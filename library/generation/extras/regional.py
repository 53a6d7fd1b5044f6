"""Regional prompts: the parts of a prompt between ` AND `, each with a network of its own, each in its part of the image.

Network i belongs to sub-prompt i. On the text encoder, and on keys and values of the cross-attention, it acts on that
sub-prompt alone, not on the negative prompt. Elsewhere in the U-Net what it adds is multiplied by mask i, except at the
timestep's embedding, which has no positions. Outputs of the cross-attention are mixed:

    sum_i mask_i * out_i / (sum_i mask_i + 1e-4)  +  sum_i mask_i * lora_i(out_i)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from library.data.images import BadImage, decode_values
from library.errors import UserError
from library.generation.prompts.spec import check_regions

if TYPE_CHECKING:
    from library.generation.extras.networks import Networks

EPSILON = 1e-4


@dataclass
class Regions:
    """Where each sub-prompt acts. `image` is (H, W, 3), uint8; `codes` the number of exact colours, or None for channels."""

    image: np.ndarray
    networks: Networks
    codes: int | None = None
    _by_size: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: str | Path, networks: Networks, color_codes: int | None = None) -> Regions:
        """Masks from the colours of an image: red for the first sub-prompt, green for the second, blue for the third.

        With `color_codes` N: the exact colours 1 to N, where bit 0 of the number is red, bit 1 green, bit 2 blue.
        """
        try:
            image = decode_values(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"--mask_path {path}: {error.strerror or error}") from None
        except BadImage as error:
            raise UserError(f"--mask_path {path}: {error}") from None
        if color_codes is not None and not 1 <= color_codes <= 7:
            raise UserError(f"--network_regional_mask_max_color_codes {color_codes}: there are 7 colours; give 1 to 7")
        return cls(image, networks, color_codes)

    def check_networks(self) -> None:
        """UserError for networks that cannot have masks."""
        if self.networks.merged or self.networks.pre_calc:
            raise UserError("regional prompts need networks with masks; leave --network_merge and --network_pre_calc out")
        for loaded in self.networks.loaded:
            if not loaded.module.__name__.startswith("networks."):
                raise UserError(f"regional prompts: {loaded.module.__name__} cannot be masked; use networks.lora")

    def check(self, prompts: list[str]) -> None:
        """UserError unless the networks can have masks and each has a sub-prompt."""
        self.check_networks()
        check_regions(prompts, len(self.networks.loaded))

    def masks(self, count: int, height: int, width: int, device: torch.device) -> Tensor:
        """(count, 1, height, width), float32 in 0..1, for this many sub-prompts."""
        key = (count, height, width, device)
        if key not in self._by_size:
            masks = [self._mask(index).resize((width, height), Image.Resampling.BOX) for index in range(count)]
            values = np.stack([np.asarray(mask, dtype=np.float32) / 255 for mask in masks])
            self._by_size[key] = torch.from_numpy(values).unsqueeze(1).to(device)
        return self._by_size[key]

    def _mask(self, index: int) -> Image.Image:
        """Of one sub-prompt, in the size of the image. What no colour is left for acts everywhere."""
        full = Image.new("L", (self.image.shape[1], self.image.shape[0]), 255)
        if self.codes is not None:
            if index >= self.codes:
                return full
            colour = [255 if (index + 1) >> bit & 1 else 0 for bit in range(3)]
            return Image.fromarray(((self.image == colour).all(axis=2) * 255).astype(np.uint8))
        if index >= 3 or not self.image[:, :, index].any():
            return full
        return Image.fromarray(np.ascontiguousarray(self.image[:, :, index]))

    @contextmanager
    def acting(self, unet: nn.Module, batch: int, sub_prompts: int, plain: int, height: int, width: int) -> Iterator[None]:
        """Within: the U-Net reads (plain + sub_prompts) * batch rows of context beside (plain + 1) * batch latents.

        height, width: of the latents. plain: how many predictions without regions, for negative and empty prompt, go before the
        wanted one.
        """
        layout = _Layout(self, batch, sub_prompts, plain, height, width)
        with ExitStack() as undo:
            for name, attention in unet.named_modules():
                if name.endswith(".attn2"):
                    undo.callback(attention.set_processor, attention.processor)
                    attention.set_processor(_RegionalAttention(layout))
            for index, loaded in enumerate(self.networks.loaded):
                for lora in loaded.network.parts.get("lora_unet", ()):
                    handle = lora.register_forward_hook(partial(layout.limit, index))
                    undo.callback(handle.remove)
            yield


@dataclass
class _Layout:
    """Which rows of a batch belong to which sub-prompt, and the masks in the sizes of the U-Net's layers."""

    regions: Regions
    batch: int
    sub_prompts: int
    plain: int
    height: int
    width: int

    def masks_of(self, positions: int, device: torch.device) -> Tensor:
        """(P, 1, positions, 1): the masks for a layer with this number of positions."""
        height, width = self.height, self.width
        while height * width > positions:
            height, width = (height + 1) // 2, (width + 1) // 2
        return self.regions.masks(self.sub_prompts, height, width, device).flatten(2).unsqueeze(-1)

    def limit(self, index: int, lora: Any, inputs: tuple[Tensor, ...], added: Tensor) -> Tensor:
        """What the LoRA of network `index` adds, where and on which rows it may."""
        name, rows = lora.lora_name, self.plain * self.batch
        if added.dim() == 2:  # the timestep's embedding, which has no positions
            return added
        if "_attn2_to_k" in name or "_attn2_to_v" in name or "_attn2_to_out" in name:
            own = torch.zeros(len(added), 1, 1, device=added.device)
            own[rows + index * self.batch : rows + (index + 1) * self.batch] = 1
            if "_attn2_to_out" in name:  # divided by this sum when the outputs are mixed
                own = own * self._sum(added.shape[1], added.device)
            return added * own.to(added.dtype)
        if added.dim() == 4:
            height, width = added.shape[2:]
            return added * self.regions.masks(self.sub_prompts, height, width, added.device)[index].to(added.dtype)
        return added * self.masks_of(added.shape[1], added.device)[index].to(added.dtype)

    def mix(self, outputs: Tensor) -> Tensor:
        """((plain + P) * B, positions, width) -> ((plain + 1) * B, positions, width)."""
        rows = self.plain * self.batch
        masks = self.masks_of(outputs.shape[1], outputs.device)
        parts = outputs[rows:].view(self.sub_prompts, self.batch, *outputs.shape[1:])
        mixed = (parts * masks.to(parts.dtype)).sum(dim=0) / self._sum(outputs.shape[1], outputs.device).to(parts.dtype)
        return torch.cat([outputs[:rows], mixed])

    def _sum(self, positions: int, device: torch.device) -> Tensor:
        return self.masks_of(positions, device).sum(dim=0) + EPSILON


@dataclass
class _RegionalAttention:
    """Cross-attention to every sub-prompt, mixed by masks; a processor of Diffusers' `Attention`."""

    layout: _Layout

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        layout = self.layout
        query, key, value = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        rows = layout.plain * layout.batch
        query = torch.cat([query[:rows], query[rows:].repeat(layout.sub_prompts, 1, 1)])
        heads = [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        output = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return layout.mix(attn.to_out[1](attn.to_out[0](output)))
