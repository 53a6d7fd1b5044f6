"""Every option of gen_img_diffusers.py, in typed groups. Names, defaults and meanings are those people know from sd-scripts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from library.command_line import OptionGroup, parse
from library.diffusion.samplers import SamplerName
from library.errors import UserError, counted
from library.generation.prompts.spec import LARGEST_SEED, MAX_STEPS, SIZE_STEP, split_regions
from library.generation.unsupported_options import UNSUPPORTED
from library.option_traits import option


def _seeds(value: Any) -> Any:
    """`7` or `1,2,3`."""
    try:
        seeds = tuple(int(part) for part in str(value).split(","))
    except ValueError:
        seeds = ()
    if not seeds or not all(0 <= seed <= LARGEST_SEED for seed in seeds):
        raise ValueError(f"expected a whole number from 0 to {LARGEST_SEED}, or several with commas (1,2,3), got {value!r}")
    return seeds


Seeds = Annotated[tuple[int, ...], BeforeValidator(_seeds)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=64, multiple_of=SIZE_STEP)]
Crop = Annotated[int, Field(ge=0)]
Depth = Annotated[int, Field(ge=0, le=3)]
Share = Annotated[float, Field(ge=0, le=1)]


class ModelOptions(OptionGroup):
    """Model"""

    ckpt: str | None = option(
        None, help="checkpoint (.safetensors, .ckpt), a pattern for one file, Diffusers folder or hub id", path=True
    )
    v2: bool = option(False, help="the model is Stable Diffusion 2.x")
    sdxl: bool = option(False, help="the model is SDXL; else it is an error")
    v_parameterization: bool = option(False, help="the model predicts velocity (SD 2.x 768)")
    zero_terminal_snr: bool = option(False, help="the model was trained on a noise schedule that ends in pure noise")
    vae: str | None = option(None, help="another VAE: checkpoint, Diffusers folder or hub id", path=True)
    clip_skip: Count | None = option(None, help="use the text encoder's Nth layer from the end")
    textual_inversion_embeddings: list[str] | None = option(None, help="embedding files; the file's name is its word", path=True)


class PromptOptions(OptionGroup):
    """Prompts"""

    prompt: str | None = option(None, help="one prompt, with in-line options")
    from_file: str | None = option(None, help="text file, one prompt a line; - reads standard input", path=True)
    interactive: bool = option(False, help="ask for prompts, one after another")
    no_preview: bool = option(False, help="with --interactive: do not show the images")
    max_embeddings_multiples: Count | None = option(None, help="read prompts up to this number of chunks of 75 tokens; unset: 1")
    images_per_prompt: Count = option(1, help="images of each prompt")
    n_iter: Count = option(1, help="how often the list of prompts is drawn")
    shuffle_prompts: bool = option(False, help="in another order each time")
    seed: Seeds | None = option(None, help="seed, or seeds 1,2,3 that are handed out from the front")
    iter_same_seed: bool = option(False, help="one seed for all images of a pass over the list")


class ImageOptions(OptionGroup):
    """Size and sampling"""

    W: Side | None = option(None, help="width in pixels; unset: the size the model was made for")
    H: Side | None = option(None, help="height in pixels; unset: the size the model was made for")
    steps: int = option(50, ge=1, le=MAX_STEPS, help="denoising steps")
    sampler: SamplerName = option("ddim", help="sampling method")
    scale: float = option(7.5, help="guidance; 1 or less switches it off")
    negative_scale: float | None = option(None, help="separate guidance away from the negative prompt")


class SizeOptions(OptionGroup):
    """Size conditioning (SDXL)"""

    original_width: Count | None = option(None, help="width of the original, for size conditioning; unset: the image's")
    original_height: Count | None = option(None, help="height of the original, for size conditioning; unset: the image's")
    original_width_negative: Count | None = option(None, help="the same for the negative prompt; unset: as for the prompt")
    original_height_negative: Count | None = option(None, help="the same for the negative prompt; unset: as for the prompt")
    crop_top: Crop | None = option(None, help="rows of the original that were cropped at the top; unset: 0")
    crop_left: Crop | None = option(None, help="columns of the original that were cropped at the left; unset: 0")


class NetworkOptions(OptionGroup):
    """Networks"""

    network_module: list[str] | None = option(None, help="module of each network; one name is for all; unset: networks.lora")
    network_weights: list[str] | None = option(None, help="file of each network", path=True)
    network_mul: list[float] | None = option(None, help="strength of each network; missing ones are 1.0")
    network_args: list[str] | None = option(None, help='per network "key=value;key=value"')
    network_show_meta: bool = option(False, help="print the metadata of each file")
    network_merge: bool = option(False, help="merge all networks into the model; --am then does nothing")
    network_merge_n_models: Count | None = option(None, help="merge the first N networks only")
    network_pre_calc: bool = option(False, help="add the networks to the weights for each batch: faster, same images")
    network_regional_mask_max_color_codes: Count | None = option(None, help="regional masks by exact colours 1 to N")
    lora_dir: str | None = option(None, help="folder in which <lora:name:0.8> in a prompt is found", path=True)

    def problems(self) -> list[str]:
        """What does not go together, each with the cure."""
        files, modules = len(self.network_weights or ()), len(self.network_module or ())
        rules: list[tuple[Any, str]] = [
            (self.network_merge and self.network_merge_n_models,
             "--network_merge and --network_merge_n_models exclude each other"),
            ((self.network_merge_n_models or 0) > files,
             f"--network_merge_n_models {self.network_merge_n_models} is more than --network_weights has; give at most {files}"),
            (modules > 1 and modules != files,
             f"--network_module has {modules} names for {counted(files, 'file')} of --network_weights; give one for each"),
        ]  # fmt: skip
        for name in ("network_mul", "network_args"):
            given = len(getattr(self, name) or ())
            surplus = (
                f"--{name} has {counted(given, 'value')} for {counted(files, 'file')} of --network_weights; leave the surplus out"
            )
            rules.append((given > files, surplus))
        rules.append((self.network_pre_calc and not (files or self.lora_dir),
                      "--network_pre_calc needs --network_weights or --lora_dir"))  # fmt: skip
        names = ("network_module", "network_show_meta", "network_merge", "network_regional_mask_max_color_codes")
        rules += [(getattr(self, name) and not files, f"--{name} needs --network_weights") for name in names]
        return [message for wrong, message in rules if wrong]


class SourceOptions(OptionGroup):
    """From images"""

    image_path: str | None = option(None, help="image, or folder of images, to start from (img2img)", path=True)
    mask_path: str | None = option(None, help="white is repainted; with several sub-prompts: regions of networks", path=True)
    strength: Share | None = option(None, help="how much of the image is redrawn, 0 to 1; unset: 0.8")


class HighresOptions(OptionGroup):
    """Two stages"""

    highres_fix_scale: float | None = option(
        None, gt=0, le=1, help="draw at this share of the size first, then enlarge and redraw"
    )
    highres_fix_steps: int = option(28, ge=1, le=MAX_STEPS, help="steps of the first stage")
    highres_fix_strength: Share | None = option(None, help="--strength of the first stage, with --image_path; unset: the same")
    highres_fix_save_1st: bool = option(False, help="save the images of the first stage too")
    highres_fix_latents_upscaling: bool = option(False, help="enlarge latents instead of pixels")
    highres_fix_upscaler: str | None = option(None, help="module of yours that enlarges")
    highres_fix_upscaler_args: str | None = option(None, help='"key=value;key=value" for that module')


class DeepShrinkOptions(OptionGroup):
    """Large images in one stage (Deep Shrink)"""

    ds_depth_1: Depth | None = option(
        None, help="shrink the features at this depth of the U-Net, 0 to 3; switches Deep Shrink on"
    )
    ds_timesteps_1: int = option(650, help="until this timestep")
    ds_depth_2: Depth | None = option(None, help="then at this depth")
    ds_timesteps_2: int = option(650, help="until this timestep")
    ds_ratio: float = option(0.5, gt=0, le=1, help="to this share of their size")


class SpeedOptions(OptionGroup):
    """Precision, memory and speed"""

    fp16: bool = option(False, help="compute in fp16")
    bf16: bool = option(False, help="compute in bf16")
    no_half_vae: bool = option(False, help="keep the VAE in float32 (cures black images)")
    batch_size: Count = option(1, help="images made at once where size, steps and settings agree")
    vae_batch_size: float | None = option(None, gt=0, help="images the VAE decodes at once; below 1: a share of the batch")
    vae_slices: Count | None = option(None, help="slices in which the VAE works through an image: same image, less memory")
    vae_tiling: bool = option(False, help="the VAE works on tiles: far less memory, seams are blended")
    xformers: bool = option(False, help="attention by xformers, if it is installed and there is a GPU")
    diffusers_xformers: bool = option(False, help="the same as --xformers")
    sdpa: bool = option(False, help="attention by torch (this is the default)")
    opt_channels_last: bool = option(False, help="channels-last memory layout: faster on some cards")


class OutputOptions(OptionGroup):
    """Output"""

    outdir: str = option("outputs", help="folder for the images", path=True)
    sequential_file_name: bool = option(False, help="names im_000001.png, im_000002.png and so on")
    use_original_file_name: bool = option(False, help="with --image_path: the name of the source image")
    sheet: bool = option(False, help="also one labelled sheet: prompts and seeds by networks and strengths")
    sheet_strengths: list[float] | None = option(None, help="strengths that the sheet compares; 0 is without network")


class GenerateOptions(BaseModel):
    """The whole command line."""

    model: ModelOptions = ModelOptions()
    prompts: PromptOptions = PromptOptions()
    image: ImageOptions = ImageOptions()
    sizes: SizeOptions = SizeOptions()
    network: NetworkOptions = NetworkOptions()
    source: SourceOptions = SourceOptions()
    highres: HighresOptions = HighresOptions()
    deep_shrink: DeepShrinkOptions = DeepShrinkOptions()
    speed: SpeedOptions = SpeedOptions()
    output: OutputOptions = OutputOptions()

    @model_validator(mode="after")
    def _options_fit_together(self) -> GenerateOptions:
        problems = [message for wrong, message in _rules(self) if wrong]
        if problems:
            raise UserError("; ".join(problems))
        return self

    def means_regions(self, prompt: str) -> bool:
        """Whether the mask is of regions in which networks act for this prompt, rather than of what is repainted.

        With an image to begin from it is regions only where the user asks for them: by several sub-prompts, or by colours.
        """
        network, source = self.network, self.source
        if not source.mask_path or not network.network_weights or network.network_merge:
            return False
        asked = network.network_regional_mask_max_color_codes is not None or len(split_regions(prompt)) > 1
        return asked or not source.image_path


def _rules(o: GenerateOptions) -> list[tuple[Any, str]]:
    """(whether it is wrong, what is wrong and what to do)."""
    prompts, speed, output, source = o.prompts, o.speed, o.output, o.source
    has_prompts = prompts.prompt is not None or prompts.from_file or prompts.interactive or source.image_path
    return [
        (not o.model.ckpt, "--ckpt is missing: give the model to draw with"),
        (not has_prompts, "no prompts: give --prompt, --from_file or --interactive"),
        (prompts.prompt is not None and prompts.from_file, "--prompt and --from_file exclude each other"),
        (prompts.interactive and prompts.from_file == "-",
         "--interactive and --from_file - both read standard input; choose one"),
        (speed.fp16 and speed.bf16, "--fp16 and --bf16 exclude each other"),
        (output.sequential_file_name and output.use_original_file_name,
         "--sequential_file_name and --use_original_file_name exclude each other"),
        (output.use_original_file_name and not source.image_path, "--use_original_file_name needs --image_path"),
        (source.image_path and (o.image.W is None) != (o.image.H is None),
         "--image_path takes the images' own size, or that of both --W and --H; give both or none"),
        (source.mask_path and not source.image_path and not o.network.network_weights,
         "--mask_path needs --image_path (to repaint) or --network_weights (regions)"),
        (source.mask_path and o.network.network_merge and not source.image_path,
         "--mask_path shows where networks act, and for that they cannot be merged; leave --network_merge out"),
        (o.network.network_regional_mask_max_color_codes and not source.mask_path,
         "--network_regional_mask_max_color_codes needs --mask_path"),
        (source.strength is not None and not (source.image_path or o.highres.highres_fix_scale),
         "--strength needs --image_path or --highres_fix_scale"),
        *((True, problem) for problem in o.network.problems()),
        *_highres_rules(o.highres, source),
        *_sheet_rules(o),
    ]  # fmt: skip


def _highres_rules(highres: HighresOptions, source: SourceOptions) -> list[tuple[Any, str]]:
    names = ("highres_fix_save_1st", "highres_fix_latents_upscaling", "highres_fix_upscaler")
    rules = [(getattr(highres, name) and not highres.highres_fix_scale, f"--{name} needs --highres_fix_scale") for name in names]
    if "highres_fix_steps" in highres.model_fields_set:
        rules.append((not highres.highres_fix_scale, "--highres_fix_steps needs --highres_fix_scale"))
    first_strength = highres.highres_fix_strength is not None
    return [
        *rules,
        (first_strength and not (highres.highres_fix_scale and source.image_path),
         "--highres_fix_strength needs --highres_fix_scale and --image_path"),
        (highres.highres_fix_latents_upscaling and highres.highres_fix_upscaler,
         "--highres_fix_latents_upscaling and --highres_fix_upscaler exclude each other"),
        (highres.highres_fix_upscaler_args and not highres.highres_fix_upscaler,
         "--highres_fix_upscaler_args needs --highres_fix_upscaler"),
    ]  # fmt: skip


def _sheet_rules(o: GenerateOptions) -> list[tuple[Any, str]]:
    network, strengths = o.network, o.output.sheet_strengths
    return [
        (strengths is not None and not o.output.sheet, "--sheet_strengths needs --sheet"),
        (strengths is not None and not network.network_weights, "--sheet_strengths needs --network_weights"),
        (strengths == [], "--sheet_strengths is empty; give strengths such as 0 0.5 1"),
        (strengths and network.network_mul, "--sheet_strengths and --network_mul exclude each other"),
        (o.output.sheet and (network.network_merge or network.network_merge_n_models),
         "--sheet compares networks one by one, so they cannot be merged; leave --network_merge out"),
        (o.output.sheet and o.prompts.interactive, "--sheet and --interactive exclude each other"),
        (o.output.sheet and o.prompts.n_iter > 1, "--sheet draws the list once; use --images_per_prompt for several seeds"),
    ]  # fmt: skip


def parse_options(arguments: list[str]) -> GenerateOptions:
    """The options of one run from the command line."""
    return parse(GenerateOptions, arguments, "Make images with Stable Diffusion and any number of networks.", UNSUPPORTED)
