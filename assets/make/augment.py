"""What the autoencoder sees of an image: shifted, flipped, and at times as line art, grey or in other colours.

LoRAs learn styles that are not in the base model's images, line art above all, so the autoencoder has to carry them; these
images are made from the colour images themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 8  # pixels of the image at full size
# Shares of images that are changed; the rest keep their colours.
GREY, LINES, INVERTED, OTHER_COLOURS = 0.04, 0.2, 0.03, 0.07


def augmented(images: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..1 -> the same shape, by torch's random numbers."""
    return torch.stack([_change(_moved(image)) for image in images])


def _moved(image: Tensor) -> Tensor:
    """Flipped half of the time, and shifted by up to 8 pixels; what comes in repeats the border."""
    if torch.rand(()) < 0.5:
        image = image.flip(-1)
    height, width = image.shape[-2:]
    padded = F.pad(image[None], (SHIFT,) * 4, mode="replicate")[0]
    top, left = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    return padded[:, top : top + height, left : left + width]


def _change(image: Tensor) -> Tensor:
    choice = torch.rand(()).item()
    grey = image.mean(dim=0, keepdim=True)
    if choice < GREY:
        return grey.expand(3, -1, -1)
    if choice < GREY + LINES:
        return line_art(grey).expand(3, -1, -1)
    if choice < GREY + LINES + INVERTED:
        return 1 - image
    if choice < GREY + LINES + INVERTED + OTHER_COLOURS:
        return image[torch.randperm(3)] * (0.6 + 0.4 * torch.rand(3, 1, 1))
    return image


def line_art(grey: Tensor) -> Tensor:
    """(1, H, W) in 0..1 -> black lines where brightness changes, on white; at times dark parts are filled, or all is inverted."""
    smooth = F.avg_pool2d(grey[None], 3, stride=1, padding=1, count_include_pad=False)  # else white would darken at the border
    padded = F.pad(smooth, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    edges = (torch.hypot(across, down) * (2 + 6 * torch.rand(())) - 0.15).clamp(0, 1)
    drawing = 1 - F.max_pool2d(edges, 3, stride=1, padding=1)[0]
    if torch.rand(()) < 0.4:
        threshold = 0.25 + 0.35 * torch.rand(())
        drawing = torch.minimum(drawing, ((grey - threshold) * 12 + 0.5).clamp(0, 1))
    return 1 - drawing if torch.rand(()) < 0.1 else drawing
