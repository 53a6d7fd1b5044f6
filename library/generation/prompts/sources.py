"""Where prompts come from: the command line, a file, standard input, or the text fields of source images."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from library.data import folders
from library.errors import UserError, listed, one_line
from library.generation.prompts.written import WrittenPrompt
from library.text_files import decoded, lines_of, read_text

if TYPE_CHECKING:
    from library.generation.options import PromptOptions

log = logging.getLogger(__name__)

GUESS = False  # of the encoding, as captions from other programs need it; one file of prompts is easily saved as UTF-8


def list_images(path: str | None, option: str) -> list[Path]:
    """The image, or those of a folder in the order of their names. Images there that are not read are logged."""
    if path is None:
        return []
    given = Path(path)
    if not given.is_dir():
        if not given.is_file():
            raise UserError(f"{option} {path}: there is no such file or folder")
        return [given]
    found, unread = folders.list_images(given), folders.unread_images(given, ".txt")
    if unread:
        log.warning("%s %s: images left out, since their kinds are not read: %s", option, path, listed(unread))
    if not found:
        raise UserError(f"{option} {path}: the folder holds no image ({' '.join(folders.image_suffixes())})")
    return found


def read_prompts(chosen: PromptOptions, sources: list[Path]) -> list[WrittenPrompt]:
    """The prompts in order, or those of the source images; none if they will be asked for."""
    if chosen.prompt is not None:
        return [WrittenPrompt(chosen.prompt, "--prompt")]
    if chosen.from_file:
        return _from_lines(chosen.from_file)
    if chosen.interactive:
        return []
    return [_from_image(path) for path in sources]


def _from_lines(file: str) -> list[WrittenPrompt]:
    """One prompt a line; empty lines and those that begin with # are comments."""
    if file == "-":
        text, name = read_standard_input(), "standard input"
    else:
        path = Path(file)
        if path.suffix.lower() in (".toml", ".json"):
            raise UserError(f"--from_file {file}: give a text file (.txt) with one prompt a line")
        text, name = read_text(path, "--from_file", guess=GUESS), file
    prompts = [
        WrittenPrompt(line, f"{name}, line {number}")
        for number, line in enumerate(lines_of(text), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not prompts:
        raise UserError(f"--from_file {file}: there is no prompt in it; write one prompt a line")
    return prompts


def read_standard_input() -> str:
    """All of it, as `decoded` reads a file."""
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:  # a text stream of a program around this one
        return sys.stdin.read()
    try:
        return decoded(buffer.read(), guess=GUESS)
    except UnicodeDecodeError as error:
        raise UserError(f"--from_file -: byte {error.start} of standard input is no UTF-8; write it as UTF-8") from error


def _from_image(path: Path) -> WrittenPrompt:
    """The fields `prompt` and `negative-prompt` that this script writes into its images."""
    from library.data.images import BadImage, open_image

    try:
        with path.open("rb") as file, open_image(io.BytesIO(file.read())) as image:
            fields = dict(getattr(image, "text", {}))  # a PNG may have its text after the image: then this reads all of it
    except BadImage as error:
        raise UserError(f"--image_path {path}: {error}") from error
    except Exception as error:  # the decoders raise all sorts of errors for a damaged image
        raise UserError(f"--image_path {path}: cannot be read as an image: {one_line(error)}") from error
    if "prompt" not in fields:
        raise UserError(f"{path} holds no prompt of this script; give --prompt or --from_file")
    return WrittenPrompt(fields["prompt"], str(path), negative_prompt=fields.get("negative-prompt", ""), source=path)
