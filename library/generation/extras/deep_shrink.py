"""Deep Shrink: the U-Net computes the first, coarse timesteps at a smaller size; see `DeepShrink`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from library.generation.prompts.spec import DeepShrink


def check_deep_shrink(setting: DeepShrink, depths: int) -> None:
    """UserError unless the setting fits a U-Net with `depths` down blocks."""
    for option, depth in (("ds_depth_1", setting.depth_1), ("ds_depth_2", setting.depth_2)):
        if depth is not None and not 0 <= depth < depths:
            raise UserError(f"--{option} {depth}: the U-Net has the depths 0 to {depths - 1}")
    if not 0 < setting.ratio <= 1:
        raise UserError(f"--ds_ratio {setting.ratio}: give a share above 0 and at most 1")


@contextmanager
def shrinking(unet: Any, setting: DeepShrink | None) -> Iterator[None]:
    """Within: the U-Net shrinks its features by this setting. None: it does not."""
    if setting is None:
        yield
        return
    state = _State(setting)
    with ExitStack() as undo:

        def hook(register: Any, function: Any) -> None:
            undo.callback(register(function, with_kwargs=True).remove)

        hook(unet.register_forward_pre_hook, state.read_timestep)
        for depth, block in enumerate(unet.down_blocks):
            hook(block.register_forward_pre_hook, state.shrink_at(depth))
        for block in unet.up_blocks:
            hook(block.register_forward_pre_hook, state.note_sizes)
            layers = getattr(block, "attentions", None) or block.resnets
            for index, layer in enumerate(layers):
                hook(layer.register_forward_hook, state.grow_after(block, index))
        hook(unet.conv_norm_out.register_forward_pre_hook, state.grow_last)
        yield


class _State:
    """What the hooks of one U-Net share within a step. All sizes are (height, width)."""

    def __init__(self, setting: DeepShrink) -> None:
        self.setting = setting
        self.timestep = 0.0
        self.full_size: tuple[int, int] = (0, 0)
        self.wanted: dict[int, list[tuple[int, int]]] = {}  # by block: sizes of what each of its layers is joined with

    @property
    def depth(self) -> int | None:
        """Where the features shrink at this timestep."""
        if self.timestep >= self.setting.timestep_1:
            return self.setting.depth_1
        return self.setting.depth_2 if self.timestep >= self.setting.timestep_2 else None

    def read_timestep(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        sample, timestep = args[:2]
        self.timestep, self.full_size = float(timestep), tuple(sample.shape[-2:])

    def shrink_at(self, depth: int) -> Any:
        def shrink(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if self.depth != depth:
                return None
            height, width = (max(1, int(side * self.setting.ratio)) for side in kwargs["hidden_states"].shape[-2:])
            return args, {**kwargs, "hidden_states": resize(kwargs["hidden_states"], (height, width))}

        return shrink

    def note_sizes(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before a block on the way up: the way down left `res_hidden_states_tuple`, the last of which is used first."""
        sizes = [tuple(features.shape[-2:]) for features in reversed(kwargs["res_hidden_states_tuple"])]
        self.wanted[id(block)] = sizes
        return args, {**kwargs, "hidden_states": resize(kwargs["hidden_states"], sizes[0])}

    def grow_after(self, block: nn.Module, index: int) -> Any:
        def grow(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            sizes = self.wanted[id(block)]
            if index + 1 >= len(sizes):
                return None
            if isinstance(output, tuple):  # of a transformer block
                return (resize(output[0], sizes[index + 1]), *output[1:])
            return resize(output, sizes[index + 1])

        return grow

    def grow_last(self, norm: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (resize(args[0], self.full_size), *args[1:]), kwargs


def resize(features: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) in another size, bicubic; the same tensor where it has that size."""
    if tuple(features.shape[-2:]) == size:
        return features
    return F.interpolate(features, size=size, mode="bicubic", align_corners=False)
