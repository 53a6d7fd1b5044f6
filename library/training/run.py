"""One training run from its options to its files: set up in the order things are needed, cheap checks first."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm

from library.data.dataset import TrainingDataset
from library.data.debug import write_debug_sheet
from library.data.loader import make_loader
from library.data.text_cache import TextCache
from library.devices import DTYPES, cpu_has_fast_bf16, keep_freed_memory, peak_memory_bytes, use_all_cores, use_xformers
from library.generation.prompts import PromptSpec, read_prompt_file
from library.models.clip import tokenize, tokenize_weighted
from library.models.model import StableDiffusion, encode_text, load_stable_diffusion, vae_fingerprint
from library.processes import EndedElsewhere, Processes, launched_world, timeout
from library.training.checkpointing import use_gradient_checkpointing
from library.training.compatible import model_digest
from library.training.ema import make_average, weights_in_use
from library.training.estimates import base_formats
from library.training.frozen import freeze_convolutions
from library.training.fused_backward import step_in_backward
from library.training.hub import Uploads
from library.training.loss_plot import try_loss_plot
from library.training.memory import compile_model, free_what_rests, pack_frozen_weights
from library.training.metadata import RunMetadata, all_model_facts, run_facts
from library.training.network import TrainedNetwork, build_network
from library.training.optimizers import create_optimizer
from library.training.options import TrainNetworkOptions
from library.training.plan import Plan
from library.training.precision import HalfGradScaler, check_half_weights, trained_dtype
from library.training.preflight import Ready, preflight
from library.training.previews import Previews
from library.training.randomness import seed_everything
from library.training.resume import begin_at
from library.training.saving import ModelFiles
from library.training.schedules import create_schedule, schedule_facts
from library.training.state import StateFiles
from library.training.trackers import Tracker, logged_options
from library.training.trainer import Trainer
from library.training.validation import Validation, open_validation, validation_timesteps


def train(options: TrainNetworkOptions) -> int:
    """Train as the options say. Returns the exit code: 0, or 130 after Ctrl-C.

    Of several processes all end with the same code, and the main one alone speaks.
    """
    accelerator = make_accelerator(options)
    processes = Processes()
    try:
        with processes.ending_together():
            return train_here(options, accelerator, processes)
    except EndedElsewhere as error:
        return error.exit_code
    except KeyboardInterrupt:  # no time to wait for the others
        processes.broken = True
        raise
    finally:
        processes.close()


def train_here(options: TrainNetworkOptions, accelerator: Accelerator, processes: Processes) -> int:
    """Train as one of the processes of a run."""
    set_up_machine(options, accelerator)
    ready = processes.on_main(lambda: preflight(options, accelerator.device, processes.world))
    print(ready.dataset.bucket_table())
    if options.data.debug_dataset:
        sheet = processes.on_main(lambda: write_debug_sheet(ready.dataset, Path(options.output.output_dir)))
        print(f"the pictures are in {sheet}")
        return 0
    trainer = prepare(options, ready, accelerator, processes)
    started = time.perf_counter()
    finished = trainer.run()
    seconds = time.perf_counter() - started
    trainer.skipped = sum(processes.gather(trainer.skipped))
    processes.on_main(lambda: summarize(trainer, finished, seconds))
    return 0 if finished else 130


def prepare(options: TrainNetworkOptions, ready: Ready, accelerator: Accelerator, processes: Processes) -> Trainer:
    """Everything between the pictures and the first step."""
    dataset, seed, plan = ready.dataset, ready.seed, ready.plan
    specs = preview_specs(options, dataset)
    dataset.max_train_steps = plan.max_steps
    held_out = open_validation(dataset)

    model = load_model(options, accelerator)
    for part in filter(None, (dataset, held_out)):
        cache_latents(options, part, model, processes)
    seed_everything(seed)
    network = build_network(options.network, options.optimizer, model)
    network.module.to(accelerator.device, trained_dtype(options))
    processes.same_weights(network.module)
    text_cache = cache_text(options, [part for part in (dataset, held_out) if part], model, network)
    digest = model_digest(model)  # of all parts, so before some are freed
    rests = {"vae_rests": dataset.latents is not None, "text_encoder_rests": text_cache is not None}
    free_what_rests(options, model, **rests, draws=bool(specs))
    pack_frozen_weights(options, model, accelerator.device)
    if not options.precision.torch_compile:  # a compiler sees itself what is needed
        freeze_convolutions(model.unet)
    if options.training.gradient_checkpointing:
        use_gradient_checkpointing(options, model, network, dataset, accelerator.autocast)
    compile_model(options, model, network.trains_text_encoder)

    optimizer, optimizer_text = create_optimizer(options.optimizer, network.groups, accelerator.device)
    check_half_weights(optimizer, optimizer_text, trained_dtype(options))
    schedule = create_schedule(options.optimizer, optimizer, plan.max_steps)
    if options.optimizer.fused_backward_pass:
        step_in_backward(optimizer, options.optimizer.max_grad_norm)
    average = make_average(options.validation, network.parameters, optimizer)
    in_use = partial(weights_in_use, optimizer, average)
    network.module.prepare_grad_etc(model.text_encoder, model.unet)
    tracker = Tracker(options.logs, logged_options(options) if options.logs.log_config else None, processes.main)
    facts = run_facts(
        options, dataset.describe(), network, seed=seed, optimizer=optimizer_text, batches_per_epoch=plan.turns_per_epoch,
        epochs=plan.epochs, max_train_steps=plan.max_steps, processes=accelerator.num_processes,
    ) | schedule_facts(options.optimizer, optimizer)  # fmt: skip
    print_plan(options, plan, network, seed)
    uploads = Uploads(options.hub, active=processes.main)
    uploads.prepare()
    files = ModelFiles(options.output, in_use, uploads, writes=processes.main)
    trainer = Trainer(
        options=options, accelerator=accelerator, model=model, model_digest=digest, network=network, dataset=dataset,
        loader=make_loader(
            dataset, num_workers=options.augmentation.max_data_loader_n_workers,
            persistent=options.augmentation.persistent_data_loader_workers, pin_memory=accelerator.device.type == "cuda",
            rank=processes.rank, world=processes.world,
        ),
        text_cache=text_cache, optimizer=accelerator.prepare(optimizer), schedule=schedule, plan=plan, seed=seed,
        files=files, metadata=RunMetadata(facts, lambda: all_model_facts(options.model), options.metadata.no_metadata),
        previews=Previews(options, specs, model, network.module, accelerator, tracker, processes, in_use), tracker=tracker,
        processes=processes,
        states=StateFiles(options.state, files),
        weights_to_use=in_use, average=average,
        validation=Validation(
            held_out, options.validation, accelerator.device, processes, seed=seed,
            num_workers=options.augmentation.max_data_loader_n_workers,
            timesteps=validation_timesteps(options.loss.min_timestep, options.loss.max_timestep),
        ) if held_out else None,
    )  # fmt: skip
    begin_at(trainer, ready.start, ready.resumed)
    return trainer


def make_accelerator(options: TrainNetworkOptions) -> Accelerator:
    """The accelerator; with several processes it connects them. Without a GPU they talk through gloo."""
    return Accelerator(
        cpu=launched_world() > 1 and not torch.cuda.is_available(),  # else accelerate would run them side by side, each alone
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout(options.training.ddp_timeout))],
        mixed_precision=options.training.mixed_precision,
    )


def set_up_machine(options: TrainNetworkOptions, accelerator: Accelerator) -> None:
    """Memory, threads and loss scaler."""
    if options.precision.full_fp16:
        accelerator.scaler = HalfGradScaler(accelerator.device.type)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        print(f"no GPU: training on the CPU, {use_all_cores()} threads")
        if options.training.mixed_precision == "bf16" and not cpu_has_fast_bf16():
            print("this processor has no bf16 units: --mixed_precision no is many times faster here")


def preview_specs(options: TrainNetworkOptions, dataset: TrainingDataset) -> list[PromptSpec]:
    """The prompts of --sample_prompts; a size that they leave open is the training size of the first dataset."""
    path = options.previews.sample_prompts
    if not path or not options.previews.are_asked_for:
        return []
    width, height = dataset.table.configs[0].resolution
    return read_prompt_file(Path(path), PromptSpec(width=width, height=height, sampler=options.previews.sample_sampler))


def load_model(options: TrainNetworkOptions, accelerator: Accelerator) -> StableDiffusion:
    """The frozen model in the dtype it computes in, on the device; a U-Net that is going to be packed waits in main memory."""
    chosen, is_packed = options.model, base_formats(options)["unet"]
    model = load_stable_diffusion(
        chosen.pretrained_model_name_or_path, v2=chosen.v2, v_parameterization=chosen.v_parameterization, vae=chosen.vae,
        dtype=DTYPES[options.training.mixed_precision], device="cpu" if is_packed else accelerator.device,
    )  # fmt: skip
    if is_packed:
        model.text_encoder.to(accelerator.device)
        model.vae.to(accelerator.device)
    if chosen.no_half_vae:
        model.vae.to(torch.float32)
    if chosen.xformers and not chosen.mem_eff_attn:
        use_xformers(model.unet, accelerator.device)
    return model


def cache_latents(options: TrainNetworkOptions, dataset: TrainingDataset, model: StableDiffusion, processes: Processes) -> None:
    """Encode all pictures once, if --cache_latents or --cache_latents_to_disk; several processes share the work."""
    chosen = options.augmentation
    if not (chosen.cache_latents or chosen.cache_latents_to_disk):
        return

    @torch.inference_mode()
    def encode(images: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        posterior = model.vae.encode(images.to(model.vae.device, model.vae.dtype)).latent_dist
        noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])
        return (posterior.mean.float() + posterior.std.float() * noise.to(posterior.mean.device)).cpu()

    dataset.cache_latents(
        encode, batch_size=chosen.vae_batch_size, to_disk=chosen.cache_latents_to_disk, fingerprint=vae_fingerprint(model.vae),
        share=(processes.rank, processes.world), gather=processes.gather,
    )  # fmt: skip


def cache_text(
    options: TrainNetworkOptions, datasets: list[TrainingDataset], model: StableDiffusion, network: TrainedNetwork
) -> TextCache | None:
    """Encode all captions once, if the text encoder is not trained and the captions do not change without end."""
    found = [None if network.trains_text_encoder else dataset.caption_variants() for dataset in datasets]
    if None in found:
        return None
    variants = [caption for captions in found for caption in captions]
    captions = options.captions

    @torch.no_grad()
    def encode(texts: list[str]) -> torch.Tensor:
        if captions.weighted_captions:
            ids, weights = tokenize_weighted(model.tokenizer, texts, captions.max_token_length)
            weights = weights.to(model.text_encoder.device)
        else:
            ids, weights = tokenize(model.tokenizer, texts, captions.max_token_length), None
        return encode_text(model.text_encoder, ids.to(model.text_encoder.device), options.model.clip_skip, weights).cpu()

    return TextCache.build(variants, encode, batch_size=16)


def print_plan(options: TrainNetworkOptions, plan: Plan, network: TrainedNetwork, seed: int) -> None:
    """What is about to happen."""
    if hasattr(network.module, "summary"):
        precision = options.output.save_precision
        print(f"network {options.network.network_module}: {network.module.summary(DTYPES[precision] if precision else None)}")
    else:
        print(f"network {options.network.network_module}: {sum(p.numel() for p in network.parameters):,} trainable numbers")
    shared = f" ({plan.accumulation} on each of {plan.processes} processes)" if plan.processes > 1 else ""
    print(
        f"plan: {plan.max_steps} steps of {plan.batches_per_step} batch{'es' if plan.batches_per_step > 1 else ''}{shared}, "
        f"{plan.batches_per_epoch} batches an epoch, {plan.epochs} epochs; seed {seed}"
    )


def summarize(trainer: Trainer, finished: bool, seconds: float) -> None:
    """The last screen: where the files are, the final loss, the speed, the memory."""
    output, files, losses = trainer.options.output, trainer.files, trainer.losses
    plot = files.folder / f"{output.output_name or 'last'}-loss.png"
    drawn = try_loss_plot(losses, plot, output.output_name or "loss", trainer.validations.history)
    trainer.tracker.finish()
    files.uploads.finish()
    last = files.written[-1]
    peak = peak_memory_bytes(trainer.accelerator.device)
    rows = [("LoRA" if finished else "LoRA so far", str(last)), ("loss plot", drawn)]
    if trainer.validations.best is not None:
        step, loss = trainer.validations.best
        rows.append(("best", f"{files.best_path()} (validation loss {loss:.5f} after step {step})"))
    rows += [("also saved", str(path)) for path in files.written[:-1]]
    if losses.average is not None:
        rows.append(("loss", f"{losses.average:.4f} (mean of the last epoch)"))
    rows.append(
        ("speed", f"{trainer.seconds_per_step:.3f} s a step, {trainer.step - trainer.first_step} steps in {seconds:.0f} s")
    )
    if peak:
        rows.append(("peak memory", f"{peak / 2**30:.2f} GiB"))
    if trainer.skipped:
        rows.append(("skipped", f"{trainer.skipped} batches whose loss was not finite"))
    if finished and trainer.step < trainer.plan.max_steps:
        rows.append(
            ("stopped early", f"after step {trainer.step}: {trainer.validations.without_improvement} validations were not better")
        )
    if not finished and trainer.states.at_end:
        rows.append(("to go on", f"run the same command with --resume={trainer.states.step_path(trainer.step)}"))
    elif not finished:
        rows.append(("to go on", f"run the same command with --network_weights={last} --dim_from_weights"))
    width = max(len(name) for name, _ in rows)
    tqdm.write("")
    for name, value in rows:
        tqdm.write(f"  {name:<{width}}  {value}")
