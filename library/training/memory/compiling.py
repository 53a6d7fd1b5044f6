"""--torch_compile: the U-Net, and the text encoder if it is trained, compiled by torch."""

from __future__ import annotations

import torch
from torch import nn

from library.errors import UserError, nearest

# Names that sd-scripts offers and that went away with the back ends behind them.
GONE = ("aot_ts_nvfuser", "nvprims_nvfuser", "ofi", "fx2trt")


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
    """Compile at the first call; names, weights and whatever is attached to the modules stay as they are."""
    for module in modules:
        module.compile(backend=backend)
