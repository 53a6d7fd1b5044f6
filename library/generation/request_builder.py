"""From prompts to requests: alternatives, seeds, source images, repeats. No model is needed for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from library.errors import UserError, counted
from library.generation.options import GenerateOptions
from library.generation.prompts.alternatives import Template
from library.generation.prompts.inline import parse_line
from library.generation.prompts.loras import PromptLoras, split_loras
from library.generation.prompts.seeds import Seeds
from library.generation.prompts.sources import list_images
from library.generation.prompts.spec import (
    DeepShrink,
    PromptSpec,
    SizeConditioning,
    check_negative_scale,
    check_regions,
    split_regions,
)
from library.generation.prompts.written import WrittenPrompt
from library.safe_text import as_unicode, is_unicode

DEFAULT_STRENGTH = 0.8


@dataclass(frozen=True)
class Request:
    """One image that is asked for. written: its prompt, before alternatives were chosen. seeds: those of its own line (--d)."""

    spec: PromptSpec
    written: WrittenPrompt
    seeds: tuple[int, ...] = ()

    @property
    def where(self) -> str:
        """Where its prompt was written, for error messages."""
        return self.written.where


class RequestBuilder:
    """Makes requests of prompts. Seeds, random choices and source images go on from call to call.

    `problems` collects the lines that are not understood, each once; `notes` what the user may not expect.
    """

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options
        self.sources = list_images(options.source.image_path, "--image_path")
        self.masks = list_images(options.source.mask_path, "--mask_path")
        self._loras = PromptLoras(Path(options.network.lora_dir) if options.network.lora_dir else None)
        self.problems: dict[str, str] = {}
        self.notes: list[str] = []
        given = options.prompts.seed
        # Choices and order have their own generators, so that one more alternative does not change the seeds.
        name = None if given is None else ",".join(map(str, given))
        self._choices = Random(None if name is None else f"variants {name}")
        self._order = Random(None if name is None else f"order {name}")
        self._seeds: Seeds | None = None
        self._sources_used = 0
        self._networks = len(options.network.network_weights or ()) - (options.network.network_merge_n_models or 0)

    def build(self, prompts: list[WrittenPrompt]) -> list[Request]:
        """The images of these prompts, all repeats included, in the order in which they are drawn."""
        if not prompts:
            return []
        chosen = self.options.prompts
        repeats = 1 if chosen.interactive else chosen.n_iter
        passes = [self._one_pass(prompts) for _ in range(repeats)]
        requests = [request for one_pass in passes for request in one_pass]
        self._check_deep_shrink(requests)
        if self.options.output.sheet:
            return self._with_seeds_of_a_sheet(requests)
        if self._seeds is None:
            handed_out = repeats if chosen.iter_same_seed else len(requests)
            self._seeds = Seeds(chosen.seed, None if chosen.interactive and not chosen.iter_same_seed else handed_out)
        seeded = [request for one_pass in passes for request in self._with_seeds(one_pass, self._seeds)]
        if self._seeds.unused and not chosen.interactive and seeded:
            unused = ", ".join(map(str, self._seeds.unused))
            self.notes.append(f"--seed has more seeds than there are images; not used: {unused}")
        return [self._with_source(request) for request in seeded]

    def _one_pass(self, prompts: list[WrittenPrompt]) -> list[Request]:
        prompts = [prompt for prompt in prompts if prompt.where not in self.problems]
        if self.options.prompts.shuffle_prompts:
            self._order.shuffle(prompts)
        requests = []
        for prompt in prompts:
            try:
                requests += self._requests_of(prompt)
            except UserError as error:
                self.problems[prompt.where] = str(error)
        return requests

    def _requests_of(self, written: WrittenPrompt) -> list[Request]:
        count = self._per_prompt
        if not is_unicode(written.text):
            cure = "write it anew, or set the terminal to UTF-8"
            raise UserError(f"{written.where}: '{as_unicode(written.text)}' has bytes that are no UTF-8; {cure}")
        if written.source is not None:
            values = {"prompt": written.text, "negative_prompt": written.negative_prompt, "image": written.source}
            return [self._request(values, written)] * count
        template = Template(written)
        prompts = template.prompts(count, self._choices)
        if template.enumerates and self.options.output.sheet:
            prompts = [prompt for prompt in prompts for _ in range(count)]  # every prompt of a sheet has all its seeds
        return [self._request(self._values(prompt), written) for prompt in prompts]

    @property
    def _per_prompt(self) -> int:
        """Images of each prompt; a sheet has one for each seed of the list."""
        chosen = self.options.prompts
        listed = len(chosen.seed or ()) if self.options.output.sheet and not chosen.iter_same_seed else 1
        return max(chosen.images_per_prompt, listed)

    def _request(self, values: dict[str, Any], written: WrittenPrompt) -> Request:
        """What the values of a line set, and for all else the command line."""
        image, source, shrink = self.options.image, self.options.source, self.options.deep_shrink
        seeds = values.pop("seeds", ())
        shrinking: dict[str, Any] = {
            "depth_1": shrink.ds_depth_1, "timestep_1": shrink.ds_timesteps_1, "depth_2": shrink.ds_depth_2,
            "timestep_2": shrink.ds_timesteps_2, "ratio": shrink.ds_ratio,
        }  # fmt: skip
        sizes = self.options.sizes.model_dump(exclude_none=True)
        for field in [field for field in values if "." in field]:
            kind, _, name = field.partition(".")
            {"deep_shrink": shrinking, "sizes": sizes}[kind][name] = values.pop(field)
        defaults = PromptSpec(
            width=image.W, height=image.H, scale=image.scale, steps=image.steps, sampler=image.sampler,
            negative_scale=image.negative_scale, strength=DEFAULT_STRENGTH if source.strength is None else source.strength,
            deep_shrink=DeepShrink(**shrinking) if shrinking["depth_1"] is not None else None, sizes=SizeConditioning(**sizes),
        )  # fmt: skip
        return Request(replace(defaults, **values), written, seeds)

    # ---- what a line sets

    def _values(self, prompt: WrittenPrompt) -> dict[str, Any]:
        """The values of a line. UserError for what is not understood, or does not go with the command line."""
        where = prompt.where
        values = parse_line(prompt.text, where, columns=prompt.columns, check=self._check_option)
        self._check_line_of_deep_shrink(values, where)
        if self.options.network.network_merge and values.pop("multipliers", None):
            self.notes.append(f"{where}: --am does nothing, as --network_merge made the networks part of the model")
        image = self.options.image
        try:
            for name, _ in split_loras(values["prompt"])[1]:
                self._loras.find(name)
            negative_scale = values.get("negative_scale", image.negative_scale)
            check_negative_scale(values.get("scale", image.scale), negative_scale)
            if self.options.means_regions(values["prompt"]):
                check_regions(split_regions(values["prompt"]), self._networks)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return values

    def _check_option(self, name: str, value: Any) -> None:
        """UserError for an in-line option that has no effect without another option on the command line."""
        if name == "am" and not self._networks:
            raise UserError("needs --network_weights that are not merged")
        if name == "am" and len(value) > self._networks:
            raise UserError(
                f"has {counted(len(value), 'strength')} for {counted(self._networks, 'network')}; leave the surplus out"
            )
        if name == "am" and self.options.output.sheet:
            raise UserError("does not go with --sheet, which compares the strengths of --sheet_strengths")
        if name == "t" and not (self.sources or self.options.highres.highres_fix_scale):
            raise UserError("needs --image_path or --highres_fix_scale on the command line")

    def _check_line_of_deep_shrink(self, values: dict[str, Any], where: str) -> None:
        """UserError for in-line options of Deep Shrink without the depth that they are for."""
        chosen = self.options.deep_shrink
        given = {field.removeprefix("deep_shrink.") for field in values if field.startswith("deep_shrink.")}
        if given and "depth_1" not in given and chosen.ds_depth_1 is None:
            raise UserError(f"{where}: Deep Shrink has no depth; give --dsd1 in the line or --ds_depth_1 on the command line")
        if "timestep_2" in given and "depth_2" not in given and chosen.ds_depth_2 is None:
            cure = "give --dsd2 in the line or --ds_depth_2 on the command line"
            raise UserError(f"{where}: Deep Shrink has no second depth; {cure}")

    def _check_deep_shrink(self, requests: list[Request]) -> None:
        """UserError for options of Deep Shrink that do nothing, as neither they nor a line gives the depth."""
        given = self.options.deep_shrink.model_fields_set
        needs = {"depth_1": ("ds_timesteps_1", "ds_depth_2", "ds_timesteps_2", "ds_ratio"), "depth_2": ("ds_timesteps_2",)}
        if self.options.prompts.interactive or not requests:
            return
        for depth, options in needs.items():
            idle = [f"--{name}" for name in options if name in given]
            if idle and all(getattr(request.spec.deep_shrink, depth, None) is None for request in requests):
                cure = f"give --ds_{depth}, or --dsd{depth[-1]} in a line"
                raise UserError(f"{', '.join(idle)}: Deep Shrink does nothing without a depth; {cure}")

    # ---- seeds and sources

    def _with_seeds(self, requests: list[Request], seeds: Seeds) -> Iterator[Request]:
        """The requests of one pass; those of --d of a line win, in turn and from the front again."""
        same = seeds.next() if self.options.prompts.iter_same_seed else None
        for number, request in _numbered_by_line(requests):
            listed = seeds.next() if same is None and not request.seeds else same
            yield _with(request, seed=request.seeds[number % len(request.seeds)] if request.seeds else listed)
        self._note_unused(requests)

    def _with_seeds_of_a_sheet(self, requests: list[Request]) -> list[Request]:
        """Every prompt has the same seeds, so that they can be compared."""
        count = self._per_prompt
        alike = self.options.prompts.iter_same_seed
        seeds = Seeds(self.options.prompts.seed, 1 if alike else count).take(1 if alike else count)
        seeded = []
        for number, request in _numbered_by_line(requests):
            own = request.seeds or seeds
            seeded.append(self._with_source(_with(request, seed=own[number % count % len(own)])))
        self._note_unused(requests)
        return seeded

    def _note_unused(self, requests: list[Request]) -> None:
        """Note which seeds of --d no image gets."""
        counts = Counter(request.where for request in requests)
        for request in {request.where: request for request in requests}.values():
            unused = request.seeds[counts[request.where] :]
            named = ", ".join(map(str, unused))
            note = f"{request.where}: --d has more seeds than images; not used: {named} (see --images_per_prompt)"
            if unused and note not in self.notes:
                self.notes.append(note)

    def _with_source(self, request: Request) -> Request:
        """Source images and masks are used in turn, image by image."""
        number = self._sources_used
        self._sources_used += 1
        if not self.sources:
            return request
        repaints = bool(self.masks) and not self.options.means_regions(request.spec.prompt)
        mask = self.masks[number % len(self.masks)] if repaints else None
        return _with(request, image=request.spec.image or self.sources[number % len(self.sources)], mask=mask)


def _with(request: Request, **values: Any) -> Request:
    return replace(request, spec=replace(request.spec, **values))


def _numbered_by_line(requests: list[Request]) -> Iterator[tuple[int, Request]]:
    """Each request with its number among those of the same line, from 0."""
    counts: Counter[str] = Counter()
    for request in requests:
        yield counts[request.where], request
        counts[request.where] += 1
