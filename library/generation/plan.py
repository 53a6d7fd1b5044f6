"""From prompts to the list of images to make: variants, seeds, source images, repeats. No model is needed for that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from library.errors import UserError
from library.generation.options import GenerateOptions
from library.generation.prompt_lines import LineRules, PromptLine, read_prompt_line
from library.generation.prompt_loras import PromptLoras, split_loras
from library.generation.prompt_sources import RawPrompt, list_images
from library.generation.prompts import check_negative_scale, check_regions, split_regions
from library.generation.seeds import Seeds
from library.generation.variants import Line, Text


@dataclass(frozen=True)
class Request:
    """One image to make. What its line leaves open is filled in when the model is known."""

    line: PromptLine
    raw: str  # the line as it was written
    where: str
    seed: int = 0
    source: Path | None = None
    mask: Path | None = None


class Planner:
    """Makes requests of prompts. Seeds, random choices and source images go on from call to call.

    `problems` collects the lines that are not understood, each once; `notes` what the user may not expect.
    """

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options
        self.sources = list_images(options.source.image_path, "--image_path")
        masks = list_images(options.source.mask_path, "--mask_path")
        self.masks = masks if self.sources and not self._regional else []  # a mask without sources shows regions
        self._loras = PromptLoras(Path(options.network.lora_dir) if options.network.lora_dir else None)
        self.problems: dict[str, str] = {}
        self.notes: list[str] = []
        given = options.prompts.seed
        # Choices and order have generators of their own: a variant more does not change the seeds.
        name = None if given is None else ",".join(map(str, given))
        self._variants = Random(None if name is None else f"variants {name}")
        self._order = Random(None if name is None else f"order {name}")
        self._seeds: Seeds | None = None
        self._made = 0
        self._rules = LineRules(
            networks=len(options.network.network_weights or ()) - (options.network.network_merge_n_models or 0),
            sheet=options.output.sheet,
            redraws=bool(self.sources or options.highres.highres_fix_scale),
            shrinks=options.deep_shrink.ds_depth_1 is not None,
            shrinks_twice=options.deep_shrink.ds_depth_2 is not None,
        )

    @property
    def _regional(self) -> bool:
        """Whether the mask says where networks act, rather than what is repainted."""
        return bool(self.options.network.network_weights and not self.options.network.network_merge)

    def plan(self, prompts: list[RawPrompt]) -> list[Request]:
        """The images of these prompts, all repeats included, in the order in which they are to be made."""
        if not prompts:
            return []
        chosen = self.options.prompts
        repeats = 1 if chosen.interactive else chosen.n_iter
        passes = [self._one_pass(prompts) for _ in range(repeats)]
        requests = [request for made in passes for request in made]
        self._check_deep_shrink(requests)
        if self.options.output.sheet:
            return self._with_seeds_of_a_sheet(requests)
        if self._seeds is None:
            handed_out = repeats if chosen.iter_same_seed else len(requests)
            self._seeds = Seeds(chosen.seed, None if chosen.interactive and not chosen.iter_same_seed else handed_out)
        seeded = [request for made in passes for request in self._with_seeds(made)]
        if self._seeds.unused and not chosen.interactive and seeded:
            unused = ", ".join(map(str, self._seeds.unused))
            self.notes.append(f"--seed has more seeds than there are images; not used: {unused}")
        return [self._with_source(request) for request in seeded]

    def _one_pass(self, prompts: list[RawPrompt]) -> list[Request]:
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

    def _requests_of(self, prompt: RawPrompt) -> list[Request]:
        count = self._per_prompt
        if prompt.source is not None:
            line = PromptLine({"prompt": prompt.text, "negative_prompt": prompt.negative_prompt or ""})
            return [Request(line, prompt.text, prompt.where, source=prompt.source)] * count
        variants = Line(prompt.text, prompt.where)
        texts = variants.texts(count, self._variants)
        if variants.enumerates and self.options.output.sheet:
            texts = [text for text in texts for _ in range(count)]  # every prompt of a sheet has all its seeds
        return [Request(self._read(text, prompt.where), prompt.text, prompt.where) for text in texts]

    @property
    def _per_prompt(self) -> int:
        """Images of each prompt; a sheet has one for each seed of the list."""
        chosen = self.options.prompts
        listed = len(chosen.seed or ()) if self.options.output.sheet and not chosen.iter_same_seed else 1
        return max(chosen.images_per_prompt, listed)

    def _read(self, text: Text, where: str) -> PromptLine:
        line = read_prompt_line(text.text, where, self._rules, text.columns)
        if self.options.network.network_merge and "multipliers" in line.values:
            self.notes.append(f"{where}: --am does nothing, as --network_merge made the networks part of the model")
            line.values.pop("multipliers")
        self._check_line(line, where)
        return line

    def _check_line(self, line: PromptLine, where: str) -> None:
        """UserError for a line that does not go with the command line."""
        image, source = self.options.image, self.options.source
        try:
            for name, _ in split_loras(line.values["prompt"])[1]:
                self._loras.find(name)
            negative_scale = line.values.get("negative_scale", image.negative_scale)
            check_negative_scale(line.values.get("scale", image.scale), negative_scale)
            if source.mask_path and self._regional:
                check_regions(split_regions(line.values["prompt"]), self._rules.networks)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _check_deep_shrink(self, requests: list[Request]) -> None:
        """UserError for options of Deep Shrink that do nothing, as neither they nor a line gives the depth."""
        given = self.options.deep_shrink.model_fields_set
        needs = {"depth_1": ("ds_timesteps_1", "ds_depth_2", "ds_timesteps_2", "ds_ratio"), "depth_2": ("ds_timesteps_2",)}
        if self.options.prompts.interactive or not requests:
            return
        for depth, options in needs.items():
            idle = [f"--{name}" for name in options if name in given]
            if idle and f"ds_{depth}" not in given and not any(depth in request.line.shrink for request in requests):
                cure = f"give --ds_{depth}, or --dsd{depth[-1]} in a line"
                raise UserError(f"{', '.join(idle)}: Deep Shrink does nothing without a depth; {cure}")

    def _with_seeds(self, requests: list[Request]) -> Iterator[Request]:
        """The requests of one pass; --d of a line beats all, from the front and in a circle."""
        same = self._seeds.next() if self.options.prompts.iter_same_seed else None
        for number, request in _numbered_by_line(requests):
            if request.line.seeds:
                seed = request.line.seeds[number % len(request.line.seeds)]
            else:
                seed = self._seeds.next() if same is None else same
            yield replace(request, seed=seed)
        self._note_unused(requests)

    def _with_seeds_of_a_sheet(self, requests: list[Request]) -> list[Request]:
        """Every prompt has the same seeds, so that they can be compared."""
        count = self._per_prompt
        alike = self.options.prompts.iter_same_seed
        seeds = Seeds(self.options.prompts.seed, 1 if alike else count).take(1 if alike else count)
        seeded = []
        for number, request in _numbered_by_line(requests):
            own = request.line.seeds or seeds
            seeded.append(self._with_source(replace(request, seed=own[number % count % len(own)])))
        self._note_unused(requests)
        return seeded

    def _note_unused(self, requests: list[Request]) -> None:
        """Say which seeds of --d no image gets."""
        counts: dict[str, int] = {}
        for request in requests:
            counts[request.where] = counts.get(request.where, 0) + 1
        for request in {request.where: request for request in requests}.values():
            unused = (request.line.seeds or ())[counts[request.where] :]
            named = ", ".join(map(str, unused))
            note = f"{request.where}: --d has more seeds than images; not used: {named} (see --images_per_prompt)"
            if unused and note not in self.notes:
                self.notes.append(note)

    def _with_source(self, request: Request) -> Request:
        """Source images and masks are used in turn, image by image."""
        number = self._made
        self._made += 1
        if not self.sources:
            return request
        mask = self.masks[number % len(self.masks)] if self.masks else None
        return replace(request, source=request.source or self.sources[number % len(self.sources)], mask=mask)


def _numbered_by_line(requests: list[Request]) -> Iterator[tuple[int, Request]]:
    """Each request with its number among those of the same line, from 0."""
    counts: dict[str, int] = {}
    for request in requests:
        number = counts.get(request.where, 0)
        counts[request.where] = number + 1
        yield number, request
