"""What one image is made from: prompt, size, seed and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError, counted

SIZE_STEP, SMALLEST_SIZE = 8, 64
MAX_STEPS = 1000
LARGEST_SEED = 2**64 - 1  # what torch accepts


@dataclass(frozen=True)
class DeepShrink:
    """Compute the composition at a smaller size, so that an image larger than the model was trained on keeps one subject.

    At depth `depth_1` of the U-Net (0 the outermost block, 3 the innermost), while the timestep is `timestep_1` or more, the
    features are shrunk by `ratio`; then at `depth_2`, if given, while it is `timestep_2` or more. On the way up they regain their
    size.
    """

    depth_1: int
    timestep_1: int = 650
    depth_2: int | None = None
    timestep_2: int = 650
    ratio: float = 0.5


@dataclass(frozen=True)
class SizeConditioning:
    """Size conditioning of a model like SDXL: the original size of an image, and how much of it was cropped, in pixels.

    None: the size of the image; for the negative prompt the same as for the prompt.
    """

    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int = 0
    crop_left: int = 0

    def rows(self, width: int, height: int) -> tuple[list[int], list[int]]:
        """Numbers for the prompt and for the negative prompt: original height, width; crop top, left; target height, width."""
        end = [self.crop_top, self.crop_left, height, width]
        original = [self.original_height or height, self.original_width or width]
        negative = [self.original_height_negative or original[0], self.original_width_negative or original[1]]
        return original + end, negative + end


@dataclass(frozen=True)
class PromptSpec:
    """One image to make. Sizes in pixels; a guidance `scale` of 1 or less switches guidance off.

    width, height: None for both is the size of `image`, or else the one that the model was trained on.
    seed: None draws one at random.
    negative_scale: the negative prompt gets a scale of its own: e = e_0 + scale (e_pos - e_0) - negative_scale (e_neg - e_0),
    where e_0 is the prediction for the empty prompt. None: e = e_neg + scale (e_pos - e_neg).
    multipliers: strengths of the networks in the order in which they were given, for this image; a short list is filled with
    its last number. None: those of the command line. The prompt may hold `<lora:name:0.8>` besides.
    image: an image to begin from; it is stretched to width x height. `strength` 0..1 is the share of the steps that is run: 0
    gives the image itself. mask: white is painted anew, black kept, grey between; needs an image.
    """

    prompt: str = ""
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    scale: float = 7.5
    steps: int = 30
    sampler: str = "ddim"
    negative_scale: float | None = None
    strength: float = 0.8
    multipliers: tuple[float, ...] | None = None
    image: Path | None = None
    mask: Path | None = None
    deep_shrink: DeepShrink | None = None
    sizes: SizeConditioning = SizeConditioning()


def split_regions(prompt: str) -> list[str]:
    """The sub-prompts of a prompt for regions.

    >>> split_regions("a cat AND a dog")
    ['a cat', 'a dog']
    """
    return [part.strip() for part in prompt.split(" AND ")]


def check_regions(prompts: list[str], networks: int) -> None:
    """UserError unless each network has a sub-prompt."""
    if len(prompts) < networks:
        cure = "write one for each, with ' AND ' between"
        raise UserError(f"the prompt has {counted(len(prompts), 'part')} for {counted(networks, 'network')}; {cure}")


def check_negative_scale(scale: float, negative_scale: float | None) -> None:
    """UserError for a scale of the negative prompt where it has no effect."""
    if negative_scale is not None and scale <= 1:
        raise UserError(f"a negative scale needs a scale above 1, as guidance is off at {scale:g}")
