"""The known families of models, and detection of a model's family from names, shapes and configurations."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from pathlib import Path

from library.errors import UserError, counted
from library.formats.compvis import layout_of
from library.formats.foreign import instead_of_a_folder, instead_of_a_model
from library.formats.names import FIRST_EMBEDDER, UNET_PREFIX
from library.models import sd1, sd2, sdxl
from library.models.family import Config, Family, Shapes

FAMILIES: tuple[Family, ...] = (sd1.FAMILY, sd2.FAMILY, sdxl.FAMILY)


def by_name(name: str) -> Family:
    """The family of this name."""
    return next(family for family in FAMILIES if family.name == name)


# Pickle a family by its name, since its fields may be local functions.
copyreg.pickle(Family, lambda family: (by_name, (family.name,)))


_INPUT_CHANNELS = {
    9: "an in-painting model (9 input channels)",
    8: "an instruct-pix2pix model (8 input channels)",
    7: "an upscaler (7 input channels)",
    5: "a depth model (5 input channels)",
}


def detect(path: Path, shapes: Shapes) -> Family:
    """The family of a single file with these tensors: the one whose text encoders it holds (small models may have any width).

    Raises UserError, saying what the file is instead, if it is no model of a known family.
    """
    if not shapes:
        raise UserError(f"{path} holds no tensors; it is no model file")
    if what := instead_of_a_model(shapes):
        raise UserError(f"{path} is {what}")
    if any(name.startswith(UNET_PREFIX + "input_blocks.") for name in shapes):
        layout = layout_of(shapes, [family.layout for family in FAMILIES])
        if layout is None:
            raise UserError(f"{path} holds no text encoder, or not all that it needs; fetch the whole model")
        return next(family for family in FAMILIES if family.layout == layout)
    if any(name.startswith(("down_blocks.", "encoder.", "text_model.", "first_stage_model.", FIRST_EMBEDDER)) for name in shapes):
        raise UserError(f"{path} is one part of a model, not a whole one; give the whole file or the folder of all parts")
    raise UserError(
        f"{path} is no Stable Diffusion model: it holds {counted(len(shapes), 'tensor')} such as {next(iter(shapes))}"
    )


def detect_folder(folder: Path, pipeline: str, configs: Mapping[str, Config]) -> Family:
    """The family of a Diffusers folder with this pipeline and these configurations of its parts and its scheduler."""
    if what := instead_of_a_folder(pipeline, configs):
        raise UserError(f"{folder} is {what}")
    named = next((family for family in FAMILIES if family.pipeline == pipeline), FAMILIES[0])
    if missing := [part.name for part in named.text_parts if part.name not in configs]:
        raise UserError(f"{folder} is incomplete: {pipeline} needs {' and '.join(missing)}; fetch the whole model")
    by_pipeline = sorted(FAMILIES, key=lambda family: family.pipeline != pipeline)  # the family of this pipeline first
    return next((family for family in by_pipeline if family.owns_folder(configs)), named)


def check_v2(source: str, family: Family, v2: bool | None) -> None:
    """Raises UserError if the user's `--v2` contradicts the model; None: nothing was said."""
    if v2 is None:
        return
    if family.records.v2 and not v2:
        raise UserError(f"{source} is an SD 2.x model; add --v2 (and --v_parameterization if it is one for 768 px)")
    if v2 and not family.records.v2:
        raise UserError(f"{source} is an {family.title} model; leave out --v2")


def check_family(source: str, found: Family, wanted: str, cure: str = "use train_network.py, which trains all families") -> None:
    """Raises UserError, with the cure, for a model of another family than `wanted`."""
    if found.name != wanted:
        raise UserError(f"{source} is an {found.title} model; {cure}")


def reject_other_inputs(source: str, family: Family, channels: int) -> None:
    """Raises UserError if the denoiser takes more than latents (in-painting, depth, ...)."""
    if channels != family.latents.channels:
        what = _INPUT_CHANNELS.get(channels, f"a model with {channels} input channels")
        raise UserError(f"{source} is {what}, which is not supported; use the plain text-to-image model it was made from")


def reject_other_conditions(source: str, family: Family, config: Config) -> None:
    """Raises UserError for a denoiser with other inputs than time and text: LCM's guidance scale, unCLIP's image."""
    others = {
        "time_cond_proj_dim": "an LCM (it takes the guidance scale as an input)",
        "class_embed_type": "an unCLIP model (it takes an image as an input)",
    }
    for key, what in others.items():
        if config.get(key) is not None:
            raise UserError(f"{source} is {what}, which is not supported; use the {family.title} model it was made from")
