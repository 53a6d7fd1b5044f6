"""--torch_compile: the U-Net, and the text encoder if it is trained, compiled by torch."""

from __future__ import annotations

import torch
from torch import nn

from library.errors import UserError, nearest

# Names that sd-scripts offers and that went away with the back ends behind them.
GONE = ("aot_ts_nvfuser", "nvprims_nvfuser", "ofi", "fx2trt")
WHOLE = ("cudagraphs",)  # compile a whole model: a recorded graph saves the launches of the kernels in it


def check_backend(name: str, device: torch.device) -> None:
    """Raises UserError for a back end that torch does not know, or that cannot compile a small function on this machine."""
    if name in GONE:
        raise UserError(f"--dynamo_backend {name} does not exist in torch any more; use inductor")
    known = torch._dynamo.list_backends(None)
    if name not in known:
        close = nearest(name, known)
        cure = f"did you mean {close}?" if close else f"there are: {', '.join(known)}"
        raise UserError(f"--dynamo_backend {name} is not there, or its package is not installed; {cure}")
    try:
        torch.compile(_smallest, backend=name)(torch.ones(8, device=device))
    except Exception as error:  # whatever the back end and the compiler behind it raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--torch_compile: {name} cannot compile on this machine ({reason[:200]}); install a C++ compiler, try "
            "--dynamo_backend=aot_eager, or leave out --torch_compile"
        ) from error
    finally:
        torch._dynamo.reset()


def _smallest(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + 1


def compile_in_place(modules: list[nn.Module], backend: str) -> None:
    """Compile at the first call; names, weights and whatever is attached to the modules stay as they are.

    Except by the back ends in WHOLE, only the layers that a model repeats are compiled, each shape once: the base of the demo
    takes 70 s for them on two cores, and had not ended after 150 s as a whole.
    """
    for module in modules:
        for part in [module] if backend in WHOLE else repeated_layers(module):
            part.compile(backend=backend)


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Those of the classes that Diffusers names for a model of its own; of others the layers of lists; else the model itself."""
    names = getattr(model, "_repeated_blocks", None)  # what its compile_repeated_blocks reads
    if names:
        return [layer for layer in model.modules() if type(layer).__name__ in names]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [layer for layers in lists if len({type(layer) for layer in layers}) == 1 for layer in layers] or [model]
