"""Setting up a run in stages that each return what they made: data, model, network, run."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from library.console import KeptWarnings
from library.data.dataset import TrainingDataset
from library.data.loader import EpochLoader, make_loader
from library.devices import use_xformers
from library.diffusion.loss import Objective
from library.errors import UserError
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.prompt_file import read_prompt_file
from library.generation.prompts.spec import PromptSpec
from library.models.family import Model
from library.models.loading import ModelReading, load_stable_diffusion
from library.models.modules import weights_fingerprint
from library.parallel import in_background
from library.processes import Processes
from library.training.batch_loss import BatchLoss
from library.training.checks.estimates import fixed_bytes
from library.training.checks.preflight import Ready
from library.training.exchange import StepExchange
from library.training.loop import Listener, Loop, Outcome
from library.training.machine import Machine
from library.training.memory.frozen import freeze_layers
from library.training.memory.gradient_checkpointing import count_kept, keep_to_budget, use_gradient_checkpointing
from library.training.memory.placement import compile_model, compiles_whole_models, offload_idle_parts, pack_frozen_weights
from library.training.memory.precision import NumberFormats, check_half_weights, explain_nonfinite, vae_cure
from library.training.network import TrainedNetwork, build_network
from library.training.optimization.ema import eval_weights, make_average
from library.training.optimization.fused_backward import step_in_backward
from library.training.optimization.optimizers import create_optimizer
from library.training.optimization.schedules import create_schedule, schedule_facts
from library.training.options import AugmentationOptions, ModelOptions, PreviewOptions, TrainNetworkOptions
from library.training.outputs.base_model import all_model_facts
from library.training.outputs.hub import Uploads
from library.training.outputs.metadata import RunMetadata, run_facts
from library.training.outputs.previews import PreviewDrawer, Previews
from library.training.outputs.run_page import RunPage
from library.training.outputs.saves import SavedStates, SavedWeights
from library.training.outputs.saving import ModelFiles
from library.training.outputs.step_log import StepLog
from library.training.outputs.summary import network_summary, print_plan
from library.training.outputs.trackers import Tracker, logged_options
from library.training.outputs.tracking import LossRecord
from library.training.plan import Plan
from library.training.randomness import seed_everything
from library.training.run_state.compatible import model_digest
from library.training.run_state.resume import begin_at
from library.training.run_state.snapshot import RandomNumbers, RunIdentity, Snapshot
from library.training.run_state.state import StateFiles
from library.training.step import TrainStep
from library.training.text_caching import cache_text
from library.training.update import Limits, WeightUpdate
from library.training.validation import Validation, open_validation, validation_timesteps
from library.training.validator import Validator


@dataclass(frozen=True)
class Data:
    """The images of a run: those to train on, those held out, and the prompts of its previews."""

    train: TrainingDataset
    held_out: TrainingDataset | None
    prompts: list[PromptSpec]

    @property
    def datasets(self) -> list[TrainingDataset]:
        """Training images, and held-out ones if there are any."""
        return [self.train, self.held_out] if self.held_out else [self.train]


@dataclass(frozen=True)
class Attached:
    """A network on its model. model_digest: of the model that it is trained on, with all that was merged into it."""

    model: Model
    network: TrainedNetwork
    model_digest: str


@dataclass(frozen=True)
class Run:
    """Everything that a run is made of, ready for the first step. What changes while it runs is in `loop` and its listeners."""

    ready: Ready
    machine: Machine
    data: Data
    attached: Attached
    step: TrainStep
    loop: Loop
    tracker: Tracker
    metadata: RunMetadata
    files: ModelFiles
    states: StateFiles
    previews: Previews
    validator: Validator
    page: RunPage
    snapshot: Snapshot

    @property
    def options(self) -> TrainNetworkOptions:
        """All options; those that were left open follow the model's header."""
        return self.ready.options

    @property
    def plan(self) -> Plan:
        return self.ready.plan

    @property
    def seed(self) -> int:
        return self.ready.seed

    @property
    def model(self) -> Model:
        return self.attached.model

    @property
    def network(self) -> TrainedNetwork:
        return self.attached.network

    @property
    def losses(self) -> LossRecord:
        return self.step.losses

    def train(self) -> Outcome:
        """All steps from `loop.progress` on."""
        with self.page.kept(self):
            for listener in self.loop.listeners:
                listener.begin(self)
            return self.loop.run()


def prepare(
    ready: Ready, machine: Machine, listeners: Sequence[Listener] = (), warnings: KeptWarnings | None = None,
    model_facts: Future[dict[str, str]] | None = None, reading: ModelReading | None = None,
) -> Run:  # fmt: skip
    """Everything between the images and the first step.

    listeners: called after those of the run itself. warnings: for the page about the run. model_facts, reading: `all_model_facts`
    and `begin_reading`, if they have begun.
    """
    options = ready.options
    model_facts = model_facts or in_background(partial(all_model_facts, options.model))
    data = open_data(ready)
    model = load_model(options.model, ready.formats, machine.device, reading)
    cure = vae_cure(ready.formats, options.model.no_half_vae, model.family)
    for dataset in data.datasets:
        cache_latents(options.augmentation, dataset, model, machine.processes, cure)
    attached = attach_network(ready, model, machine)
    cache_text(options, data.datasets, model, attached.network, machine)
    place_in_memory(ready, data, attached, machine)
    page = RunPage(options.output, ready.notes, warnings, machine.processes)
    run = make_run(ready, machine, data, attached, page, model_facts, listeners)
    begin_at(run, ready.start, ready.resumed)
    return run


def open_data(ready: Ready) -> Data:
    """The indexed images, split into training and validation, and the prompts of --sample_prompts."""
    dataset = ready.dataset
    width, height = dataset.table.configs[0].resolution
    prompts = preview_specs(ready.options.previews, PromptSpec(width=width, height=height))
    dataset.max_train_steps = ready.plan.max_steps
    return Data(dataset, open_validation(dataset), prompts)


def attach_network(ready: Ready, model: Model, machine: Machine) -> Attached:
    """The network on the model, on the device, with the same weights in all processes; the model's own layers frozen."""
    options = ready.options
    seed_everything(ready.seed)
    network = build_network(options.network, options.optimizer, model, options.model.clip_skip)
    network.module.to(machine.device, ready.formats.trained)
    machine.processes.same_weights(network.module)
    if not compiles_whole_models(options.precision):
        for part in (model.denoiser, *model.text_encoders):
            freeze_layers(part)
    return Attached(model, network, model_digest(model))


def place_in_memory(ready: Ready, data: Data, attached: Attached, machine: Machine) -> None:
    """Bring the frozen model into the form in which it takes the least memory and time."""
    options, model, network = ready.options, attached.model, attached.network
    idle = ([model.vae] if data.train.latents is not None else []) + (model.text_encoders if data.train.texts is not None else [])
    offload_idle_parts(options.precision, idle, keep_for_previews=bool(data.prompts))
    pack_frozen_weights(ready.formats, model, machine.device, options.training.gradient_checkpointing)
    if options.training.gradient_checkpointing:
        use_gradient_checkpointing(model, network)
        if options.training.gradient_checkpointing_budget:
            count = partial(count_kept, model, network, data.train, options.captions.tokens, machine.autocast)
            fixed = fixed_bytes(ready.formats, options.network, ready.header)
            keep_to_budget(options.training.gradient_checkpointing_budget, fixed, model, count)
    compile_model(options.precision, model, network.trains_text_encoder)


def make_run(
    ready: Ready, machine: Machine, data: Data, attached: Attached, page: RunPage, model_facts: Future[dict[str, str]],
    listeners: Sequence[Listener],
) -> Run:  # fmt: skip
    """Optimizer, step, files and listeners."""
    options, plan, network, processes = ready.options, ready.plan, attached.network, machine.processes
    optimizer, optimizer_text = create_optimizer(options.optimizer, network.groups, machine.device)
    check_half_weights(optimizer, optimizer_text, ready.formats.trained)
    step = make_step(ready, machine, data, attached, make_update(ready, machine, attached, optimizer))
    used_weights = partial(eval_weights, optimizer, step.update.average)
    tracker = Tracker(options.logs, logged_options(options) if options.logs.log_config else None, processes.main)
    print_plan(plan, network_summary(network, options.network.module_name, options.output.save_precision), ready.seed)
    uploads = Uploads(options.hub, active=processes.main)
    uploads.prepare()
    metadata = make_metadata(ready, data, attached, optimizer, optimizer_text, model_facts)
    files = ModelFiles(options.output, used_weights, uploads, writes=processes.main)
    states = StateFiles(options.state, files)

    weights = SavedWeights(files, network.module, metadata, step.losses, plan, processes)
    drawer = PreviewDrawer(attached.model, network.module, machine, preview_settings(options, machine), used_weights)
    previews = Previews(options.previews, options.output, data.prompts, drawer, tracker, processes.main)
    validation = make_validation(options, data, ready.seed, machine)
    validator = Validator(options.validation, validation, step, used_weights, weights, tracker)
    identity = RunIdentity(options, data.train.table, attached.model_digest, plan, ready.seed, metadata)
    own: list[Listener] = [StepLog(step.losses, tracker), weights, previews, validator, page]
    snapshot = Snapshot([identity, *own, step, step.update, RandomNumbers(machine.device)])
    own.append(SavedStates(states, snapshot, weights, processes))
    batches = make_batches(options.augmentation, data, machine)
    loop = Loop(plan, step, batches, [*own, *listeners], processes, weights.rescue, ready.start)
    return Run(ready, machine, data, attached, step, loop, tracker, metadata, files, states, previews, validator, page, snapshot)


def make_metadata(
    ready: Ready, data: Data, attached: Attached, optimizer: torch.optim.Optimizer, optimizer_text: str,
    model_facts: Future[dict[str, str]],
) -> RunMetadata:  # fmt: skip
    """What the files of the run record. optimizer_text: the optimizer's full name with its arguments."""
    options, records = ready.options, attached.model.family.records
    facts = run_facts(
        options, data.train.describe(), attached.network, records, ready.plan, seed=ready.seed, optimizer=optimizer_text
    )
    facts |= schedule_facts(options.optimizer, optimizer)
    return RunMetadata(facts, model_facts, options.metadata.no_metadata)


def make_update(ready: Ready, machine: Machine, attached: Attached, optimizer: torch.optim.Optimizer) -> WeightUpdate:
    """The change of the weights, with its schedule and average."""
    options, network = ready.options, attached.network
    schedule = create_schedule(options.optimizer, optimizer, ready.plan.max_steps)
    if options.optimizer.fused_backward_pass:
        step_in_backward(optimizer, options.optimizer.max_grad_norm)
    average = make_average(options.validation, network.parameters, optimizer)
    limits = Limits(options.optimizer.max_grad_norm, options.network.scale_weight_norms)
    # The schedule is not prepared: accelerate would let it step once for each process.
    prepared = machine.accelerator.prepare(optimizer)
    return WeightUpdate(
        machine.accelerator, network, prepared, schedule, average, limits, in_backward=options.optimizer.fused_backward_pass
    )


def make_step(ready: Ready, machine: Machine, data: Data, attached: Attached, update: WeightUpdate) -> TrainStep:
    """The step with its loss, and the exchange between processes."""
    options, plan, model, network = ready.options, ready.plan, attached.model, attached.network
    network.module.prepare_grad_etc(*model.for_networks())
    is_vae_checked = options.model.no_half_vae or options.augmentation.caches_latents
    cure = None if is_vae_checked else vae_cure(ready.formats, options.model.no_half_vae, model.family)
    losses = LossRecord(plan.batches_per_epoch, explain=partial(explain_nonfinite, ready.formats, network.parameters, cure))
    process = model.process(options.loss.zero_terminal_snr)
    loss = BatchLoss(
        model, Objective(options.loss, process, machine.device), device=machine.device, autocast=machine.autocast,
        trains_text_encoder=network.trains_text_encoder, clip_skip=options.model.clip_skip,
    )  # fmt: skip
    exchange = StepExchange(machine.processes, network.parameters, plan.batches_per_step, losses, data.train.paths)
    return TrainStep(options.training, loss, update, exchange, plan, ready.seed)


def make_batches(options: AugmentationOptions, data: Data, machine: Machine) -> EpochLoader:
    """The batches of this process."""
    processes = machine.processes
    return make_loader(
        data.train, num_workers=options.max_data_loader_n_workers, persistent=options.persistent_data_loader_workers,
        pin_memory=machine.device.type == "cuda", rank=processes.rank, world=processes.world,
    )  # fmt: skip


def preview_settings(options: TrainNetworkOptions, machine: Machine) -> GenerateSettings:
    """Previews are drawn as the model is trained."""
    return GenerateSettings(
        clip_skip=options.model.clip_skip, max_token_length=options.captions.max_token_length or 225, autocast=machine.autocast,
        zero_terminal_snr=options.loss.zero_terminal_snr,
    )  # fmt: skip


def make_validation(options: TrainNetworkOptions, data: Data, seed: int, machine: Machine) -> Validation | None:
    """The validation on the held-out images, if there are any."""
    if data.held_out is None:
        return None
    return Validation(
        data.held_out, options.validation, machine.device, machine.processes, seed=seed,
        num_workers=options.augmentation.max_data_loader_n_workers,
        timesteps=validation_timesteps(options.loss.min_timestep, options.loss.max_timestep),
    )  # fmt: skip


def preview_specs(options: PreviewOptions, defaults: PromptSpec) -> list[PromptSpec]:
    """The prompts of --sample_prompts. defaults: of what a prompt leaves open, but for the sampler."""
    if not options.sample_prompts or not options.are_asked_for:
        return []
    return read_prompt_file(Path(options.sample_prompts), replace(defaults, sampler=options.sample_sampler))


def begin_reading(options: ModelOptions, formats: NumberFormats, device: torch.device) -> ModelReading | None:
    """Let threads read the model's file for `load_model`, while libraries are imported and the checks run.

    None if it is no .safetensors file of a model: then `load_model` reads it, or the checks say what is wrong.
    """
    path = Path(options.pretrained_model_name_or_path or "")
    with suppress(UserError, OSError):
        if path.suffix == ".safetensors" and path.is_file():
            return ModelReading(path, options.vae is None, formats.arithmetic, loading_device(formats, device))
    return None


def load_model(options: ModelOptions, formats: NumberFormats, device: torch.device, reading: ModelReading | None = None) -> Model:
    """The frozen model in the dtype it computes in, on the device; a U-Net that is going to be packed waits in main memory."""
    model = load_stable_diffusion(
        options.source, v2=options.v2, prediction=options.prediction, vae=options.vae, dtype=formats.arithmetic,
        device=loading_device(formats, device), reading=reading,
    )  # fmt: skip
    if formats.unet:
        for part in (*model.text_encoders, model.vae):
            part.to(device)
    if options.no_half_vae:
        model.vae.to(torch.float32)
    if options.xformers and not options.mem_eff_attn:
        use_xformers(model.denoiser, device)
    return model


def loading_device(formats: NumberFormats, device: torch.device) -> torch.device:
    """Where the model is loaded: in main memory if its U-Net is going to be packed."""
    return torch.device("cpu") if formats.unet else device


def cache_latents(options: AugmentationOptions, dataset: TrainingDataset, model: Model, processes: Processes, cure: str) -> None:
    """Encode all images once, if --cache_latents or --cache_latents_to_disk; several processes share the work.

    cure: what to do about latents that are not finite.
    """
    if not options.caches_latents:
        return

    @torch.inference_mode()
    def encode(images: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        return model.encode_images(images, [torch.Generator().manual_seed(seed) for seed in seeds]).cpu()

    dataset.cache_latents(
        encode, batch_size=options.vae_batch_size, to_disk=options.cache_latents_to_disk,
        fingerprint=weights_fingerprint(model.vae), share=(processes.rank, processes.world), gather=processes.gather,
        cure=cure,
    )  # fmt: skip
