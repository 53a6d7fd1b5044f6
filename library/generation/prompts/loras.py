"""LoRAs that a prompt calls as users of the A1111 web UI write it: `a cat <lora:ink:0.8>`."""

from __future__ import annotations

import re
from pathlib import Path

from library.errors import UserError, unknown
from library.files import composed
from library.text_values import with_plain_minus

SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")
_PROMPT_LORA = re.compile(r"<lora:([^:<>]+)(?::([^<>]*))?>", re.IGNORECASE)


def split_loras(prompt: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The prompt without its `<lora:name:strength>`, and these as (name, strength); without a number the strength is 1.

    >>> split_loras("a cat <lora:ink:0.8>, sitting")
    ('a cat , sitting', (('ink', 0.8),))
    """
    found = []
    for name, strength in _PROMPT_LORA.findall(prompt):
        try:
            found.append((name.strip(), float(with_plain_minus(strength)) if strength else 1.0))
        except ValueError:
            raise UserError(f"<lora:{name}:{strength}>: '{strength}' is not a strength; write one number, as in 0.8") from None
    return _PROMPT_LORA.sub("", prompt).strip() if found else prompt, tuple(found)


class PromptLoras:
    """The files that prompts can call: those of a folder and the folders in it. None: there are none."""

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and not folder.is_dir():
            raise UserError(f"--lora_dir {folder}: there is no such folder")
        self.folder = folder
        self._paths: dict[str, Path] | None = None

    def find(self, name: str) -> Path:
        """The file that a prompt calls `name`: its name without suffix."""
        if self.folder is None:
            raise UserError(f"the prompt asks for <lora:{name}>, but no folder to find it in is given; add --lora_dir")
        if self._paths is None:
            files = [path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES]
            self._paths = {}
            for path in sorted(files, key=lambda path: (SUFFIXES.index(path.suffix.lower()), path)):
                self._paths.setdefault(composed(path.stem), path)
        if composed(name) not in self._paths:
            raise unknown("LoRA", name, self._paths, str(self.folder))
        return self._paths[composed(name)]
