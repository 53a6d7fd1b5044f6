"""How near the change that every kind of file makes is to that of the programs that write it: LyCORIS, peft and Diffusers.

    python benchmarks/kinds.py

Each kind on a Linear layer, a 1x1 and a 3x3 convolution with random weights, in float32 there and in float64 here, through a
file. A number is the Frobenius norm of the difference, divided by that of the change: of the layer's results for "forward", of
its weight for "merged" and for peft, of a small U-Net's result for Diffusers. The largest of the three layers counts. LyCORIS
merges LoHa and LoKr right only where alpha is the rank, so it is there. Empty: that program has no such kind, or reads no such
file. Needs requirements-extras.txt. Takes half a minute, and writes benchmarks/results/kinds.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import peft  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from library.formats.lora_file import read_lora  # noqa: E402
from library.testing import small_stable_diffusion  # noqa: E402
from networks.lora import create_network, create_network_from_weights  # noqa: E402
from tests.library.formats.adapters import test_adapters_lycoris as lycoris  # noqa: E402

CORES = {"lora": lycoris.LoConModule, "loha": lycoris.LohaModule, "lokr": lycoris.LokrModule}
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": False}),
    "lora, DoRA by rows": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True, "init_lora_weights": False}),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 6, "init_weights": False}),
    "loha with Tucker core": ("LoHaConfig", {"r": 4, "alpha": 6, "use_effective_conv2d": True, "init_weights": False}),
    "lokr low rank": ("LoKrConfig", {"r": 1, "alpha": 6, "init_weights": False}),
    "lokr full": ("LoKrConfig", {"r": 64, "alpha": 6, "init_weights": False}),
}
DIFFUSERS = {"lora": False, "lora, 3x3 convolutions": True}  # whether they have any


def relative(ours: Tensor, theirs: Tensor, plain: Tensor) -> float:
    """The size of the difference, beside that of the change that they make."""
    return float((ours.double() - theirs.double()).norm() / (theirs.double() - plain.double()).norm())


@torch.no_grad()
def beside_lycoris(cls: type, options: Mapping[str, Any], shapes: list[str], folder: Path) -> tuple[float, float]:
    """The largest difference from the forward pass, and from the merged weight."""
    forward, merged = [], []
    for shape in shapes:
        layer = lycoris.LAYERS[shape]()
        rank = float(options.get("lora_dim", lycoris.RANK))
        for alpha, results in ((2.0, forward), (rank, merged)):
            module = lycoris.trained(cls, layer, **{"alpha": alpha} | options)
            adapter = lycoris.found(lycoris.saved(module, folder))
            if results is forward:
                x = lycoris.inputs(layer)
                results.append(relative(lycoris.changed_output(adapter, layer, x), module(x), layer(x)))
            else:
                weight = layer.weight.double()
                theirs, _ = module.get_merged_weight(1.0, layer.weight.shape, "cpu")
                results.append(relative(weight + adapter.weight_change(weight), theirs, weight))
    return max(forward), max(merged)


def lycoris_kinds() -> Iterator[tuple[str, type, Mapping[str, Any], list[str]]]:
    """Kind, class, options and layers."""
    for kind, (cls, options, _) in lycoris.KINDS.items():
        yield kind, cls, options, list(lycoris.LAYERS)
    for kind, ((cls, options, _), rows) in lycoris.DORA.items():
        yield kind, cls, {**options, "weight_decompose": True, "wd_on_out": rows}, list(lycoris.LAYERS)
    for kind, cls in CORES.items():
        yield f"{kind} with Tucker core", cls, {"lora_dim": 2, "use_tucker": True, "factor": 2}, ["conv 3x3"]


class Block(nn.Module):
    """Layers where a U-Net has some."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.ModuleDict({shape.replace(" ", "_"): layer() for shape, layer in lycoris.LAYERS.items()})


@torch.no_grad()
def beside_peft(kind: str, folder: Path) -> float:
    """The largest difference of the weights from those that peft merges."""
    torch.manual_seed(0)
    plain = Block()
    name, words = PEFT[kind]
    config = getattr(peft, name)(target_modules=list(plain.mid_block), **words)
    wrapped = peft.get_peft_model(copy.deepcopy(plain), config)
    for key, value in wrapped.named_parameters():
        if "magnitude" in key:
            value.mul_(1.2)
    wrapped.save_pretrained(folder)
    modules = read_lora(folder / "adapter_model.safetensors").modules
    merged = wrapped.merge_and_unload()
    found = []
    for path, layer in plain.mid_block.items():
        weight = layer.weight.double()
        change = modules[f"lora_unet_mid_block_{path}"].weight_change(weight)
        found.append(relative(weight + change, merged.mid_block[path].weight, weight))
    return max(found)


@torch.no_grad()
def beside_diffusers(with_3x3: bool, folder: Path) -> float:
    """The difference of a small U-Net's result from that with Diffusers' `load_lora_weights`."""
    from diffusers import StableDiffusionPipeline

    model = small_stable_diffusion()
    torch.manual_seed(0)
    words = {"conv_dim": "4", "conv_alpha": "2"} if with_3x3 else {}
    network = create_network(1.0, 4, 2.0, None, None, model.denoiser, **words)
    for module in network.loras:
        nn.init.normal_(module.lora_up.weight, std=0.1)
    file = folder / "lora.safetensors"
    network.save_weights(file, torch.float32, {})
    latents, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, model.denoiser.config.cross_attention_dim)

    def result() -> Tensor:
        return model.denoiser(latents, torch.tensor([500]), text).sample

    plain = result()
    loaded, weights = create_network_from_weights(1.0, file, None, None, model.denoiser)
    loaded.apply_to(None, model.denoiser)
    loaded.load_state_dict(weights)
    ours = result()
    loaded.unapply()
    state, alphas = StableDiffusionPipeline.lora_state_dict(file)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, model.denoiser)
    return relative(ours, result(), plain)


def rows() -> list[dict[str, float | str]]:
    """A row for each kind, by the titles of its cells."""
    found: dict[str, dict[str, float | str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, cls, options, shapes in lycoris_kinds():
            forward, merged = beside_lycoris(cls, options, shapes, folder)
            found[kind] = {"LyCORIS, forward": forward, "LyCORIS, merged": merged}
        for kind in PEFT:
            found.setdefault(kind, {})["peft"] = beside_peft(kind, folder)
        for kind, with_3x3 in DIFFUSERS.items():
            found.setdefault(kind, {})["Diffusers"] = beside_diffusers(with_3x3, folder)
    return [{"kind": kind, **numbers} for kind, numbers in found.items()]


def table(found: list[dict[str, float | str]]) -> list[str]:
    titles = ["kind", "LyCORIS, forward", "LyCORIS, merged", "peft", "Diffusers"]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for row in found:
        cells = [row.get(title, "") for title in titles]
        lines.append(f"| {' | '.join(f'{cell:.0e}' if isinstance(cell, float) else cell for cell in cells)} |")
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("lycoris-lora", "peft", "diffusers", "torch"))
    lines = table(rows())
    print("\n".join(lines))
    about = __doc__.split("\n\n", 2)[2].strip()
    page = ["# benchmarks/kinds.py", "", about, "", f"{versions}.", "", *lines, ""]
    (ROOT / "benchmarks" / "results" / "kinds.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
