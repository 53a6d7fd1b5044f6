"""Setting up a run in stages that each return what they made: data, model, network, places in memory, and the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from library.console import KeptWarnings
from library.data.dataset import TrainingDataset
from library.data.loader import make_loader
from library.devices import DTYPES, use_xformers
from library.diffusion.loss import Objective
from library.generation.prompts.prompt_file import read_prompt_file
from library.generation.prompts.spec import PromptSpec
from library.models.family import Model
from library.models.loading import Header, load_stable_diffusion
from library.models.modules import weights_fingerprint
from library.processes import Processes
from library.training.batch_loss import BatchLoss
from library.training.checks.estimates import base_formats
from library.training.checks.preflight import Ready
from library.training.exchange import StepExchange
from library.training.loop import Listener, Loop, Outcome
from library.training.memory.frozen import freeze_convolutions
from library.training.memory.gradient_checkpointing import use_gradient_checkpointing
from library.training.memory.placement import compile_model, offload_idle_parts, pack_frozen_weights
from library.training.memory.precision import check_half_weights, explain_nonfinite, trained_dtype, vae_cure
from library.training.network import TrainedNetwork, build_network
from library.training.optimization.ema import eval_weights, make_average
from library.training.optimization.fused_backward import step_in_backward
from library.training.optimization.optimizers import create_optimizer
from library.training.optimization.schedules import create_schedule, schedule_facts
from library.training.options import TrainNetworkOptions
from library.training.outputs.hub import Uploads
from library.training.outputs.metadata import RunMetadata, all_model_facts, run_facts
from library.training.outputs.previews import Previews
from library.training.outputs.run_page import RunPage
from library.training.outputs.saves import SavedStates, SavedWeights
from library.training.outputs.saving import ModelFiles
from library.training.outputs.step_log import StepLog
from library.training.outputs.summary import print_plan
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
        """Those there are."""
        return [self.train, self.held_out] if self.held_out else [self.train]


@dataclass(frozen=True)
class Attached:
    """A network on its model. model_digest: of the model that it is trained on, with all that was merged into it."""

    network: TrainedNetwork
    model_digest: str


@dataclass(frozen=True)
class Run:
    """Everything that a run is made of, ready for the first step. What changes while it runs is in `loop` and its listeners."""

    options: TrainNetworkOptions
    accelerator: Accelerator
    plan: Plan
    seed: int
    data: Data
    model: Model
    network: TrainedNetwork
    step: TrainStep
    loop: Loop
    losses: LossRecord
    tracker: Tracker
    metadata: RunMetadata
    files: ModelFiles
    states: StateFiles
    previews: Previews
    validator: Validator
    page: RunPage
    snapshot: Snapshot

    def train(self) -> Outcome:
        """All steps from `loop.progress` on."""
        with self.page.kept(self):
            for listener in self.loop.listeners:
                listener.begin(self)
            return self.loop.run()


def prepare(
    options: TrainNetworkOptions, ready: Ready, accelerator: Accelerator, processes: Processes,
    listeners: Sequence[Listener] = (), warnings: KeptWarnings | None = None,
) -> Run:  # fmt: skip
    """Everything between the images and the first step.

    listeners: called after those of the run itself. warnings: for the page about the run.
    """
    data = open_data(options, ready)
    model = load_model(options, accelerator)
    for dataset in data.datasets:
        cache_latents(options, dataset, model, processes)
    attached = attach_network(options, ready.seed, model, accelerator.device, processes)
    cache_text(options, data.datasets, model, attached.network, accelerator, processes)
    place_in_memory(options, data, model, ready.header, attached.network, accelerator)
    page = RunPage(options.output, ready.notes, warnings, processes)
    run = make_run(options, ready, data, model, attached, accelerator, processes, page, listeners)
    begin_at(run, ready.start, ready.resumed)
    return run


def open_data(options: TrainNetworkOptions, ready: Ready) -> Data:
    """The indexed images, parted into those for training and those for validation, and the prompts of --sample_prompts."""
    dataset = ready.dataset
    prompts = preview_specs(options, dataset)
    dataset.max_train_steps = ready.plan.max_steps
    return Data(dataset, open_validation(dataset), prompts)


def attach_network(options: TrainNetworkOptions, seed: int, model: Model, device: torch.device, processes: Processes) -> Attached:
    """The network on the model, on the device, with the same weights in all processes."""
    seed_everything(seed)
    network = build_network(options.network, options.optimizer, model, options.model.clip_skip)
    network.module.to(device, trained_dtype(options))
    processes.same_weights(network.module)
    return Attached(network, model_digest(model))


def place_in_memory(
    options: TrainNetworkOptions, data: Data, model: Model, header: Header, network: TrainedNetwork, accelerator: Accelerator
) -> None:
    """Bring the frozen model into the form in which it takes the least memory and time."""
    idle = ([model.vae] if data.train.latents is not None else []) + (model.text_encoders if data.train.texts is not None else [])
    offload_idle_parts(options, idle, keep_for_previews=bool(data.prompts))
    pack_frozen_weights(options, model, accelerator.device)
    if not options.precision.torch_compile:  # torch.compile already drops activations that it does not need
        freeze_convolutions(model.denoiser)
    if options.training.gradient_checkpointing:
        use_gradient_checkpointing(options, model, network, data.train, header, accelerator.autocast)
    compile_model(options, model, network.trains_text_encoder)


def make_run(
    options: TrainNetworkOptions, ready: Ready, data: Data, model: Model, attached: Attached, accelerator: Accelerator,
    processes: Processes, page: RunPage, listeners: Sequence[Listener],
) -> Run:  # fmt: skip
    """Optimizer, step, files and listeners."""
    plan, seed, network = ready.plan, ready.seed, attached.network
    optimizer, optimizer_text = create_optimizer(options.optimizer, network.groups, accelerator.device)
    check_half_weights(optimizer, optimizer_text, trained_dtype(options))
    step = make_step(options, optimizer, plan, seed, data, model, network, accelerator, processes)
    used_weights = partial(eval_weights, optimizer, step.average)
    tracker = Tracker(options.logs, logged_options(options) if options.logs.log_config else None, processes.main)
    facts = run_facts(
        options, data.train.describe(), network, model.family.records, seed=seed, optimizer=optimizer_text, epochs=plan.epochs,
        batches_per_epoch=plan.micro_batches_per_epoch, max_train_steps=plan.max_steps, processes=accelerator.num_processes,
    ) | schedule_facts(options.optimizer, optimizer)  # fmt: skip
    print_plan(options, plan, network, seed)
    uploads = Uploads(options.hub, active=processes.main)
    uploads.prepare()
    metadata = RunMetadata(facts, lambda: all_model_facts(options.model), options.metadata.no_metadata)
    files = ModelFiles(options.output, used_weights, uploads, writes=processes.main)
    states = StateFiles(options.state, files)

    weights = SavedWeights(files, network.module, metadata, step.losses, plan, processes)
    previews = Previews(options, data.prompts, model, network.module, accelerator, tracker, processes, used_weights)
    validator = Validator(
        options.validation, make_validation(options, data, seed, accelerator.device, processes), loss=step.loss,
        network=network, schedule=step.schedule, eval_weights=used_weights, weights=weights, tracker=tracker,
    )  # fmt: skip
    identity = RunIdentity(options, data.train.table, attached.model_digest, plan, seed, metadata)
    own: list[Listener] = [StepLog(step.losses, tracker), weights, previews, validator, page]
    snapshot = Snapshot([identity, *own, step, RandomNumbers(accelerator.device)])
    own.append(SavedStates(states, snapshot, weights, processes))
    loader = make_loader(
        data.train, num_workers=options.augmentation.max_data_loader_n_workers,
        persistent=options.augmentation.persistent_data_loader_workers, pin_memory=accelerator.device.type == "cuda",
        rank=processes.rank, world=processes.world,
    )  # fmt: skip
    loop = Loop(plan, step, loader, [*own, *listeners], processes, weights.rescue, ready.start)
    return Run(
        options, accelerator, plan, seed, data, model, network, step, loop, step.losses, tracker, metadata, files, states,
        previews, validator, page, snapshot,
    )  # fmt: skip


def make_step(
    options: TrainNetworkOptions, optimizer: torch.optim.Optimizer, plan: Plan, seed: int, data: Data, model: Model,
    network: TrainedNetwork, accelerator: Accelerator, processes: Processes,
) -> TrainStep:  # fmt: skip
    """The step with its loss, schedule and average."""
    schedule = create_schedule(options.optimizer, optimizer, plan.max_steps)
    if options.optimizer.fused_backward_pass:
        step_in_backward(optimizer, options.optimizer.max_grad_norm)
    average = make_average(options.validation, network.parameters, optimizer)
    network.module.prepare_grad_etc(*model.for_networks())
    explain = partial(explain_nonfinite, options, network.parameters, model.family)
    losses = LossRecord(window=plan.batches_per_epoch, explain=explain)
    process = model.process(options.loss.zero_terminal_snr)
    loss = BatchLoss(
        model, Objective(options.loss, process, accelerator.device), device=accelerator.device,
        autocast=accelerator.autocast, trains_text_encoder=network.trains_text_encoder, clip_skip=options.model.clip_skip,
    )  # fmt: skip
    return TrainStep(
        options, accelerator, loss=loss, network=network, optimizer=accelerator.prepare(optimizer), schedule=schedule,
        average=average, exchange=StepExchange(processes, network.parameters, plan.batches_per_step, losses), losses=losses,
        plan=plan, seed=seed, paths=data.train.paths,
    )  # fmt: skip


def make_validation(
    options: TrainNetworkOptions, data: Data, seed: int, device: torch.device, processes: Processes
) -> Validation | None:
    """The measurement on the images held out, if there are any."""
    if data.held_out is None:
        return None
    return Validation(
        data.held_out, options.validation, device, processes, seed=seed,
        num_workers=options.augmentation.max_data_loader_n_workers,
        timesteps=validation_timesteps(options.loss.min_timestep, options.loss.max_timestep),
    )  # fmt: skip


def preview_specs(options: TrainNetworkOptions, dataset: TrainingDataset) -> list[PromptSpec]:
    """The prompts of --sample_prompts; a size that they leave open is the training size of the first dataset."""
    path = options.previews.sample_prompts
    if not path or not options.previews.are_asked_for:
        return []
    width, height = dataset.table.configs[0].resolution
    return read_prompt_file(Path(path), PromptSpec(width=width, height=height, sampler=options.previews.sample_sampler))


def load_model(options: TrainNetworkOptions, accelerator: Accelerator) -> Model:
    """The frozen model in the dtype it computes in, on the device; a U-Net that is going to be packed waits in main memory."""
    chosen, is_packed = options.model, base_formats(options)["unet"]
    model = load_stable_diffusion(
        chosen.source, v2=chosen.v2, prediction=chosen.prediction, vae=chosen.vae,
        dtype=DTYPES[options.training.mixed_precision], device="cpu" if is_packed else accelerator.device,
    )  # fmt: skip
    if is_packed:
        for part in (*model.text_encoders, model.vae):
            part.to(accelerator.device)
    if chosen.no_half_vae:
        model.vae.to(torch.float32)
    if chosen.xformers and not chosen.mem_eff_attn:
        use_xformers(model.denoiser, accelerator.device)
    return model


def cache_latents(options: TrainNetworkOptions, dataset: TrainingDataset, model: Model, processes: Processes) -> None:
    """Encode all images once, if --cache_latents or --cache_latents_to_disk; several processes share the work."""
    chosen = options.augmentation
    if not (chosen.cache_latents or chosen.cache_latents_to_disk):
        return

    @torch.inference_mode()
    def encode(images: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        return model.encode_images(images, [torch.Generator().manual_seed(seed) for seed in seeds]).cpu()

    dataset.cache_latents(
        encode, batch_size=chosen.vae_batch_size, to_disk=chosen.cache_latents_to_disk,
        fingerprint=weights_fingerprint(model.vae), share=(processes.rank, processes.world), gather=processes.gather,
        cure=vae_cure(options, model.family),
    )  # fmt: skip
