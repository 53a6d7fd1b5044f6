"""The training loop, top to bottom: `Trainer.run`. What it works on is put together in run.py."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from library.data.dataset import Batch, TrainingDataset
from library.data.loader import EpochLoader
from library.data.text_cache import TextCache
from library.errors import RunFailed, UserError
from library.sd.model import StableDiffusion, encode_image, predict_noise
from library.sd.text import encode_text
from library.training.interrupt import stop_on_interrupt
from library.training.loss import Objective
from library.training.metadata import RunMetadata
from library.training.network import TrainedNetwork
from library.training.options import TrainNetworkOptions
from library.training.optimizers import found_rates
from library.training.plan import Plan
from library.training.previews import Previews
from library.training.randomness import seed_everything
from library.training.saving import ModelFiles
from library.training.tracking import LossRecord, Tracker, describe_nonfinite


LESS_MEMORY = "use --gradient_checkpointing, --cache_latents, --network_train_unet_only, a smaller batch or --optimizer_type=AdamW8bit"


@dataclass
class Trainer:
    """Everything a run needs, ready to go."""

    options: TrainNetworkOptions
    accelerator: Accelerator
    model: StableDiffusion
    network: TrainedNetwork
    dataset: TrainingDataset
    loader: EpochLoader
    text_cache: TextCache | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    plan: Plan
    seed: int
    files: ModelFiles
    metadata: RunMetadata
    previews: Previews
    tracker: Tracker

    def __post_init__(self) -> None:
        self.objective = Objective(self.options.loss, self.model.v_parameterization, self.accelerator.device)
        self.losses = LossRecord(window=self.plan.batches_per_epoch)
        self.step = 0
        self.epoch = 0
        self.skipped = 0
        self.has_gradients = False

    def run(self) -> bool:
        """Train to the last step. Returns False if Ctrl-C ended it early; the network is saved either way."""
        self.previews.at_first()
        started = time.perf_counter()
        progress = tqdm(total=self.plan.max_steps, unit="step", desc="training", smoothing=0.1)
        with stop_on_interrupt() as asked_to_stop, self._rescue(), progress:
            for self.epoch in range(1, self.plan.epochs + 1):
                self._set_training_mode()
                self.network.module.on_epoch_start(self.model.text_encoder, self.model.unet)
                for position, batch in enumerate(self.loader.epoch(self.epoch)):
                    self._start_step(position)
                    self._backward(batch, position)
                    if not self.plan.ends_step(position):
                        continue
                    self._update()
                    progress.update()
                    self._after_step(progress)
                    if asked_to_stop() or self.step >= self.plan.max_steps:
                        break
                if asked_to_stop():
                    break
                self._after_epoch()
            self.losses.flush()
        self.seconds_per_step = (time.perf_counter() - started - self.previews.seconds) / max(1, self.step)
        finished = self.step >= self.plan.max_steps
        self._save_last(finished)
        return finished

    @contextmanager
    def _rescue(self):
        """If a picture cannot be read, memory runs out or anything else goes wrong, keep what was trained until then."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise RunFailed(f"the GPU's memory is full; {LESS_MEMORY}{self._save_what_is_good()}") from error
        except UserError as error:
            raise type(error)(f"{error}{self._save_what_is_good()}") from error
        except Exception:
            tqdm.write(self._save_what_is_good())
            raise

    def _save_what_is_good(self) -> str:
        """Save the network as it is, unless it holds a NaN, and say where; nothing if no step was done."""
        path = self.files.step_path(self.step)
        with suppress(UserError):
            if self.step and not path.exists():
                self.files.save(path, self.network.module, self.metadata.at(self.step, self.epoch - 1))
                return f"; what was trained until then is in {path}"
        return ""

    def _set_training_mode(self) -> None:
        """The network trains; the frozen model is in training mode only where gradient checkpointing asks for it (it has no dropout)."""
        self.network.module.train()
        checkpointing = self.options.training.gradient_checkpointing
        self.model.unet.train(checkpointing)
        self.model.text_encoder.train(checkpointing and self.network.trains_text_encoder)

    def _start_step(self, position: int) -> None:
        """Let a network that draws something for each step, as DyLoRA its rank, do so: once a step, alike in all processes."""
        hook = getattr(self.network.module, "on_step_start", None)
        if hook is not None and self.plan.starts_step(position):
            seed_everything(self.seed, self.epoch, position)
            hook(self.model.text_encoder, self.model.unet)

    def _backward(self, batch: Batch, position: int) -> None:
        """Forward and backward of one batch; its loss is divided by the number of batches in its step."""
        seed_everything(self.seed, self.epoch, position, self.accelerator.process_index)
        loss = self.loss(batch)
        if self.options.training.on_nonfinite_loss == "skip" and not torch.isfinite(loss):
            self.skipped += 1
            tqdm.write(f"skipped a batch: {describe_nonfinite(loss.item(), self.step + 1, batch.paths)}")
            return
        self.losses.add(self.step + 1, loss, batch.paths)
        self.has_gradients = True
        self.accelerator.backward(loss / self.plan.group_size(position))

    def loss(self, batch: Batch) -> torch.Tensor:
        """The diffusion loss of a batch, a float32 scalar on the device."""
        latents, context = self._latents(batch), self._context(batch)
        noised = self.objective.noised(latents)
        with self.accelerator.autocast():
            prediction = predict_noise(self.model.unet, noised.noisy, noised.t, context)
        losses = self.objective.losses(prediction, noised)
        return (losses * batch.loss_weights.to(losses.device, non_blocking=True)).mean()

    def _latents(self, batch: Batch) -> torch.Tensor:
        device, vae = self.accelerator.device, self.model.vae
        if batch.latents is not None:
            latents = batch.latents.to(device, non_blocking=True)
        else:
            with torch.no_grad():
                latents = encode_image(vae, batch.images.to(device, vae.dtype, non_blocking=True)).float()
        return latents * vae.config.scaling_factor

    def _context(self, batch: Batch) -> torch.Tensor:
        device = self.accelerator.device
        if self.text_cache is not None:
            return self.text_cache.lookup(batch.captions).to(device, non_blocking=True)
        weights = None if batch.token_weights is None else batch.token_weights.to(device, non_blocking=True)
        with torch.set_grad_enabled(self.network.trains_text_encoder), self.accelerator.autocast():
            ids = batch.input_ids.to(device, non_blocking=True)
            return encode_text(self.model.text_encoder, ids, self.options.model.clip_skip, weights)

    def _update(self) -> None:
        """Change the weights with the gradients of this step; if all its batches were skipped there are none."""
        if not self.has_gradients:
            return
        self.has_gradients = False
        if not self.options.optimizer.fused_backward_pass:  # else it is done already
            if self.options.optimizer.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.network.parameters, self.options.optimizer.max_grad_norm)
            self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.options.network.scale_weight_norms:
            self.network.module.apply_max_norm_regularization(self.options.network.scale_weight_norms, self.accelerator.device)

    def _after_step(self, progress: tqdm) -> None:
        self.step += 1
        if self.losses.current is not None:
            progress.set_postfix(loss=f"{self.losses.current:.4f}", average=f"{self.losses.average:.4f}", refresh=False)
        self.tracker.log_step(self.step, self.losses, self.schedule.get_last_lr(), self.network.group_names, found_rates(self.optimizer))
        interval = self.options.output.save_every_n_steps
        if interval and self.step % interval == 0:
            self._save(self.files.step_path(self.step), self.epoch - 1)
            self.files.remove_old_step(self.step, interval)
        self.previews.after_step(self.step)

    def _after_epoch(self) -> None:
        self.losses.flush()
        self.tracker.log_epoch(self.epoch, self.losses)
        interval = self.files.epoch_interval(self.plan.epochs)
        if interval and self.epoch % interval == 0 and self.epoch < self.plan.epochs:
            self._save(self.files.epoch_path(self.epoch), self.epoch)
            self.files.remove_old_epoch(self.epoch, interval)
        self.previews.after_epoch(self.epoch, self.step)

    def _save(self, path: Path, epoch: int) -> None:
        self.losses.flush()
        self.files.save(path, self.network.module, self.metadata.at(self.step, epoch))
        tqdm.write(f"saved {path}")

    def _save_last(self, finished: bool) -> None:
        if not self.step:
            raise RunFailed("stopped before the first step was done; nothing was saved")
        path = self.files.final_path() if finished else self.files.step_path(self.step)
        self._save(path, self.plan.epochs if finished else self.epoch - 1)
