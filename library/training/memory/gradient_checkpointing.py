"""--gradient_checkpointing: parts of the model keep their inputs alone and are computed again in the backward pass.

With --gradient_checkpointing_budget only as many parts of the U-Net do so as the memory needs, those that keep most first. What
each part keeps is counted in two passes over tensors without content (torch's fake tensors), which takes seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor, nn

from library.data.dataset import TrainingDataset
from library.errors import one_line
from library.models.family import Conditioning, Model
from library.models.modules import evaluating
from library.training.checks.estimates import WORKSPACE, largest_batch
from library.training.network import TrainedNetwork

GIB = 2**30


def use_gradient_checkpointing(model: Model, network: TrainedNetwork) -> None:
    """Switch checkpointing on everywhere."""
    model.denoiser.enable_gradient_checkpointing()
    if network.trains_text_encoder:
        for encoder in model.text_encoders:
            encoder.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    network.module.enable_gradient_checkpointing()


def keep_to_budget(budget: float, fixed: float, model: Model, count: Callable[[], tuple[list[int], list[int]]]) -> None:
    """Leave checkpointing on in as many parts of the U-Net as the budget (GiB) requires.

    fixed: bytes beside activations. count: gives what `count_kept` does.
    """
    try:
        kept = count()
    except Exception as error:  # a network module of others may do what cannot be done without content
        reason = one_line(error, 100)
        print(f"--gradient_checkpointing_budget: cannot count with this network module ({reason}); all is checkpointed")
        model.denoiser.enable_gradient_checkpointing()
        return
    chosen, activations = choose(*kept, (budget * GIB - fixed) / WORKSPACE)
    needed = (fixed + activations * WORKSPACE) / GIB
    parts = units(model.denoiser)
    for index, part in enumerate(parts):
        part.gradient_checkpointing = index in chosen
    cure = "" if needed <= budget else "; it cannot be less: take a smaller batch or --resolution, or --base_dtype"
    share = f"{len(chosen)} of {len(parts)} parts of the U-Net"
    print(f"gradient checkpointing: {share}, about {needed:.1f} of {budget:.1f} GiB{cure}")


class Unit(nn.Module):
    """What the parts that can be checkpointed have in common; a class of Diffusers need not inherit from it."""

    gradient_checkpointing: bool


def units(unet: nn.Module) -> list[Unit]:
    """The parts of a U-Net of Diffusers that can be checkpointed one by one: blocks (their residual layers) and transformers."""
    return [cast(Unit, module) for module in unet.modules() if hasattr(module, "gradient_checkpointing")]


def choose(plain: Sequence[int], checkpointed: Sequence[int], budget: float) -> tuple[set[int], int]:
    """Which units to checkpoint, the ones that save most first, and what is kept then.

    plain, checkpointed: bytes that each unit keeps without and with checkpointing; the last number is of what lies in no unit.
    """
    saves = [before - after for before, after in zip(plain, checkpointed, strict=True)]
    chosen, total = set(), sum(plain)
    for index in sorted(range(len(saves) - 1), key=lambda i: -saves[i]):
        if total <= budget:
            break
        if saves[index] > 0:
            chosen.add(index)
            total -= saves[index]
    return chosen, total


def count_kept(
    model: Model, network: TrainedNetwork, dataset: TrainingDataset, tokens: int, autocast: Callable
) -> tuple[list[int], list[int]]:
    """Bytes that each unit keeps of the largest batch until the backward pass, without and with checkpointing.

    tokens: of a caption. autocast: makes the context in which the run computes.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    unet = model.denoiser
    batch, (width, height) = largest_batch(dataset)
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, evaluating(network.module), autocast():
        weights = [tensor for module in (unet, network.module) for tensor in (*module.parameters(), *module.buffers())]
        own = weights + [fake.from_tensor(weight) for weight in weights]  # some operations keep the one, some the other
        noisy = torch.empty(batch, unet.config.in_channels, *model.latents.size(width, height), device=unet.device)
        shapes = model.family.text.shapes(model, tokens)
        text = {name: torch.empty(batch, *shape, device=unet.device, dtype=unet.dtype) for name, shape in shapes.items()}
        sizes = torch.zeros(batch, 6, dtype=torch.int64, device=unet.device)
        times = torch.zeros(batch, dtype=torch.int64, device=unet.device)
        for unit_is_checkpointed in (False, True):
            for unit in units(unet):
                unit.gradient_checkpointing = unit_is_checkpointed
            found.append(_kept(units(unet), lambda: model.predict(noisy, times, Conditioning(text), sizes), own))
    return found[0], found[1]


def _kept(parts: Sequence[nn.Module], run: Callable[[], Tensor], own: list[Tensor]) -> list[int]:
    """Bytes kept for the backward pass of `run`, for each part; last: outside of all parts. Tensors in `own` do not count."""
    sizes, stack = [0] * (len(parts) + 1), [len(parts)]
    seen = {tensor.untyped_storage()._cdata: tensor for tensor in own}  # keeps the tensors alive, so that ids stay unique

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor
            sizes[stack[-1]] += storage.nbytes()
        return tensor

    def leave(*_: object) -> None:
        stack.pop()

    with ExitStack() as hooks:
        for index, part in enumerate(parts):
            hooks.callback(part.register_forward_pre_hook(lambda *_, index=index: stack.append(index)).remove)
            hooks.callback(part.register_forward_hook(leave).remove)
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor))
        run()
    return sizes
