"""A family of models as one frozen value, `Family`, without inheritance; and `Model`, a loaded model of a family.

`Family` has a field only if two families differ in it and trainer, data, generation or tools need it. No code outside
library/models compares a family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from library.diffusion.process import NoiseProcess, Prediction
from library.formats.compvis import Layout
from library.formats.families import Records

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]
Tokens = dict[str, Tensor]  # input of text encoders: "ids" and, for weighted text, "weights", (B, chunks, 77) each


@dataclass(frozen=True)
class Conditioning:
    """The text input of the denoiser: named tensors with a row for each image. SD: context (B, N, width)."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """As `Tensor.to`, for every tensor."""
        return Conditioning({name: value.to(*args, **kwargs) for name, value in self.tensors.items()})

    def pin_memory(self) -> Conditioning:
        """As `Tensor.pin_memory`, for every tensor."""
        return Conditioning({name: value.pin_memory() for name, value in self.tensors.items()})

    def rows(self, index: Any) -> Conditioning:
        """Some of the rows: a slice, or a list of indices."""
        return Conditioning({name: value[index] for name, value in self.tensors.items()})

    def split(self) -> Iterator[Conditioning]:
        """Every row on its own."""
        return (self.rows(slice(row, row + 1)) for row in range(len(self)))

    def with_contexts(self, contexts: Sequence[Tensor]) -> Conditioning:
        """A copy with these contexts, concatenated, instead of its own; regional prompts have several for each image."""
        return Conditioning({**self.tensors, "context": torch.cat(list(contexts))})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The concatenated rows of all parts."""
        return Conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class LatentSpace:
    """The latents of a VAE, and their scaling to about unit variance: (latents - shift) * scale."""

    channels: int = 4
    pixels_per_latent: int = 8  # on a side
    scale: float = 0.18215
    shift: float = 0.0

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents of the VAE, scaled for the denoiser."""
        return ((latents - self.shift) if self.shift else latents) * self.scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """The reverse of `scaled`."""
        plain = latents / self.scale
        return plain + self.shift if self.shift else plain

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the latents of an image."""
        return height // self.pixels_per_latent, width // self.pixels_per_latent


SD_LATENTS = LatentSpace()  # those of SD 1 and 2


@dataclass(frozen=True)
class Part:
    """One network of a model. Its name is that of its folder in Diffusers' layout."""

    name: str
    role: Literal["denoiser", "vae", "text"]
    title: str  # for messages
    build: Callable[[Mapping[str, Any]], nn.Module]  # on the meta device
    read_config: Callable[[Shapes, Prediction], Config]
    library: tuple[str, str]  # package and class, as model_index.json has them
    weight_files: tuple[str, ...]  # without suffix, in the part's folder
    # part -> (path of a layer -> its path in LoRA files, None if they do not have it); None: the paths are the same.
    file_paths: Callable[[nn.Module], Callable[[str], str | None]] | None = None

    @property
    def tokenizer(self) -> str:
        """The folder of a text encoder's tokenizer."""
        return self.name.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class TextRules:
    """How text becomes a `Conditioning`. paddings: the padding token of each text encoder's tokenizer."""

    paddings: tuple[str, ...]
    encode: Callable[[Model, Tokens, int | None], Conditioning]
    shapes: Callable[[Model, int], Mapping[str, tuple[int, ...]]]  # of a row, by the number of tokens
    clip_skip: Callable[[int | None], int | None] = lambda given: given  # --clip_skip -> the value to use; warns if it differs
    # By --clip_skip: the number of last layers of each text encoder that do not affect the encoding.
    unread: Callable[[int | None], tuple[int, ...]] = lambda clip_skip: ()


@dataclass(frozen=True)
class Family:
    """Everything in which families of models differ."""

    name: str
    title: str  # for messages
    parts: tuple[Part, ...]
    layout: Layout  # the names in a single file
    pipeline: str  # the class in model_index.json
    owns_folder: Callable[[Mapping[str, Config]], bool]  # by the configurations of a folder's parts
    text: TextRules
    predict: Callable[[Model, Tensor, Tensor, Conditioning, Tensor], Tensor]  # (model, noisy, t, conditioning, sizes)
    records: Records
    latents: LatentSpace = SD_LATENTS
    process: Callable[[Prediction], NoiseProcess] = NoiseProcess
    side_step: int = 1  # sides of training images are multiples of this many pixels
    half_vae: str | None = None  # hub id of a VAE for fp16, if the family's own overflows in it

    @property
    def text_parts(self) -> list[Part]:
        return [part for part in self.parts if part.role == "text"]

    @property
    def vae_part(self) -> Part:
        return next(part for part in self.parts if part.role == "vae")


@dataclass
class Model:
    """A loaded model: every part in eval mode, no parameter requires gradients."""

    family: Family
    parts: dict[str, Any]  # of Diffusers and transformers, whose attributes (config, dtype, ...) are looked up by name
    tokenizers: list[Any]  # one for each text encoder
    prediction: Prediction
    name: str  # as the user gave it
    path: Path | None = None  # the file or folder if it is on this machine, None for a hub id or a model made in memory
    zero_terminal_snr: bool = False  # whether its noise schedule ends in pure noise
    schedule: Mapping[str, Any] = field(default_factory=dict)  # fields of its noise process that a folder's scheduler sets
    _views: tuple[nn.Module | list[nn.Module], nn.Module] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def denoiser(self) -> Any:
        return self.parts[next(part.name for part in self.family.parts if part.role == "denoiser")]

    @property
    def vae(self) -> Any:
        return self.parts[self.family.vae_part.name]

    @property
    def text_encoders(self) -> list[Any]:
        return [self.parts[part.name] for part in self.family.text_parts]

    @property
    def latents(self) -> LatentSpace:
        """The latent space of the loaded VAE."""
        config = self.vae.config
        return replace(
            self.family.latents,
            channels=config.latent_channels,
            pixels_per_latent=2 ** (len(config.block_out_channels) - 1),
            scale=config.scaling_factor,
            shift=getattr(config, "shift_factor", None) or 0.0,
        )

    def process(self, zero_terminal_snr: bool | None = None) -> NoiseProcess:
        """The model's noise process and prediction; `zero_terminal_snr` None: that of the model."""
        own = self.zero_terminal_snr if zero_terminal_snr is None else zero_terminal_snr
        return replace(self.family.process(self.prediction), zero_terminal_snr=own, **self.schedule)

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
        """The denoiser's prediction for `noisy` (B, C, h, w): noise or velocity, as `prediction` says.

        `t`, (B,) or a scalar, are 0..999; `sizes` (B, 6) are those of `library.data.dataset.Batch`.
        """
        return self.family.predict(self, noisy, t, conditioning, sizes)

    def encode_text(self, tokens: Tokens, clip_skip: int | None = None) -> Conditioning:
        """Encode tokens; differentiable in their weights. `clip_skip` N: the Nth layer from the end; None: the default."""
        device = next(self.text_encoders[0].parameters()).device
        moved = {name: value.to(device, non_blocking=True) for name, value in tokens.items()}
        return self.family.text.encode(self, moved, clip_skip)

    def unread_layers(self, clip_skip: int | None = None) -> list[nn.Module]:
        """The layers of the text encoders that do not affect `encode_text`, so that they never get gradients."""
        found = []
        for encoder, count in zip(self.text_encoders, self.family.text.unread(clip_skip), strict=False):
            layers = next(module for path, module in encoder.named_modules() if path.endswith("encoder.layers"))
            found += list(layers)[len(layers) - count :]
        return found

    def encode_images(self, images: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Latents (B, C, h, w), float32, of images (B, 3, H, W) in -1..1: a sample of the posterior, not scaled.

        Its noise comes from torch's global generator, or from one CPU generator for each image; then it does not depend on the
        other images of the batch.
        """
        weight = next(self.vae.parameters())
        posterior = self.vae.encode(images.to(weight.device, weight.dtype, non_blocking=True)).latent_dist
        if generators is None:
            return posterior.sample().float()
        mean = posterior.mean
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        return mean.float() + posterior.std.float() * noise.to(mean.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in -1..1 of scaled latents (B, C, h, w)."""
        weight = next(self.vae.parameters())
        return self.vae.decode(self.latents.unscaled(latents.to(weight.device, weight.dtype))).sample.clamp(-1, 1)

    def for_networks(self) -> tuple[nn.Module | list[nn.Module], nn.Module]:
        """Text encoders (one module, or a list) and denoiser as network modules get them: with the paths of LoRA files."""
        if self._views is None:
            encoders = [renamed_view(self.parts[part.name], part.file_paths) for part in self.family.text_parts]
            denoiser = next(part for part in self.family.parts if part.role == "denoiser")
            view = renamed_view(self.parts[denoiser.name], denoiser.file_paths)
            self._views = (encoders[0] if len(encoders) == 1 else encoders), view
        return self._views


def renamed_view(root: nn.Module, file_paths: Callable[[nn.Module], Callable[[str], str | None]] | None) -> nn.Module:
    """The layers of `root` in a tree with the paths of files. Nodes keep their class names, by which layers are chosen.

    Layers without a path in files are left out. A view cannot be called; call `root`.
    """
    if file_paths is None:
        return root
    file_path = file_paths(root)
    if all(file_path(path) == path for path, _ in root.named_modules() if path):
        return root
    view = _node(type(root).__name__)
    for path, module in root.named_modules():
        new = file_path(path) if path else None
        if not new:
            continue
        parent = view
        *above, last = new.split(".")
        for name in above:
            if name not in parent._modules:
                parent.add_module(name, _node("Module"))
            parent = parent.get_submodule(name)
        is_layer = next(module.children(), None) is None
        if is_layer:
            parent.add_module(last, module)
        elif last not in parent._modules:
            parent.add_module(last, _node(type(module).__name__))
    return view


def _node(class_name: str) -> nn.Module:
    return type(class_name, (nn.Module,), {})()
