"""Sample images on the page of a run: small copies in the page's folder, so that hundreds of them load quickly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from library.pages.images import save_small_copy
from library.training.outputs.previews import Previews
from library.training.outputs.sample_grid import newest_images

LONGEST = 640  # pixels of a copy
SMALL_FILE = 48 * 1024  # bytes: such an image is copied as it is


class PageSamples:
    """Copies each sample image once, and says which there are."""

    def __init__(self, previews: Previews, folder: Path) -> None:
        self.previews, self.folder = previews, folder
        self._laid: dict[tuple[str, int], str] = {}

    def facts(self) -> dict[str, Any]:
        """prompts: what was asked for; steps: when; images[step][prompt]: [copy, original], as seen from the page."""
        drawn = self.previews.drawn[:]
        missing = [(moment, number) for _, moment, number in drawn if (moment, number) not in self._laid]
        if missing:
            found = newest_images(self.previews.folder, self.previews.output.output_name)
            self._originals = {key: path.name for key, path in found.items()}
            for key in missing:
                if key in found:
                    self._laid[key] = self._lay(found[key], f"sample-{key[0]}-{key[1]:02d}")
        images: dict[int, dict[int, list[str]]] = {}
        for step, moment, number in drawn:
            if name := self._laid.get((moment, number)):
                original = f"{self.previews.folder.name}/{self._originals[moment, number]}"
                images.setdefault(step, {})[number] = [f"{self.folder.name}/{name}", original]
        prompts = [
            {
                "text": spec.prompt, "negative": spec.negative_prompt, "size": [spec.width, spec.height], "seed": spec.seed,
                "steps": spec.steps, "scale": spec.scale, "sampler": spec.sampler,
            }
            for spec in self.previews.specs
        ]  # fmt: skip
        return {"prompts": prompts, "steps": sorted(images), "images": images}

    def _lay(self, original: Path, name: str) -> str:
        """The name of the copy."""
        if original.stat().st_size <= SMALL_FILE:
            shutil.copyfile(original, self.folder / f"{name}.png")
            return f"{name}.png"
        with Image.open(original) as image:
            save_small_copy(image, self.folder / f"{name}.webp", LONGEST)
        return f"{name}.webp"
