"""The training loop, top to bottom: `Trainer.run`. What it works on is put together in run.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm import tqdm

from library.data.dataset import Batch, TrainingDataset
from library.data.loader import EpochLoader
from library.data.text_cache import TextCache
from library.diffusion.loss import Objective
from library.errors import RunFailed, UserError, one_line
from library.models.clip import encode_text
from library.models.model import StableDiffusion, encode_image, evaluating, noise_process, predict_noise
from library.processes import Processes
from library.training.compatible import fingerprint
from library.training.ema import ExponentialAverage
from library.training.exchange import StepExchange
from library.training.interrupt import stop_on_interrupt
from library.training.metadata import RunMetadata
from library.training.network import TrainedNetwork
from library.training.optimizers import found_rates
from library.training.options import TrainNetworkOptions
from library.training.plan import Plan
from library.training.precision import explain_nonfinite
from library.training.previews import Previews
from library.training.randomness import seed_everything
from library.training.saving import ModelFiles, NotSaved
from library.training.schedules import OnPlateau
from library.training.snapshot import capture
from library.training.state import StateFiles
from library.training.trackers import Tracker
from library.training.tracking import LossRecord, describe_nonfinite
from library.training.validation import Validation, ValidationRecord

LESS_MEMORY = (
    "use --gradient_checkpointing, --cache_latents, --network_train_unet_only, a smaller batch or --optimizer_type=AdamW8bit"
)


@dataclass
class Trainer:
    """Everything a run needs, ready to go."""

    options: TrainNetworkOptions
    accelerator: Accelerator
    model: StableDiffusion
    model_digest: str  # of the whole model: parts that rest may be freed
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
    processes: Processes
    states: StateFiles
    weights_to_use: Callable[[], AbstractContextManager]  # in it the network holds what is validated, drawn with and saved
    average: ExponentialAverage | None = None
    validation: Validation | None = None

    def __post_init__(self) -> None:
        self.objective = Objective(
            self.options.loss, noise_process(self.model, self.options.loss.zero_terminal_snr), self.accelerator.device
        )
        self.losses = LossRecord(
            window=self.plan.batches_per_epoch, explain=lambda: explain_nonfinite(self.options, self.network.parameters)
        )
        self.exchange = StepExchange(self.processes, self.network.parameters, self.plan.batches_per_step, self.losses)
        self.validations = ValidationRecord()
        self.step = 0  # steps done
        self.epoch, self.position = 1, 0  # the epoch, from 1, and how many of its batches this process used
        self.next = (1, 0)  # the same for a run that goes on from the newest step: at an epoch's end it begins the next one
        self.skipped = 0
        self.has_gradients = False
        self.asked_to_stop = lambda: False

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """By which a state is known to be one of this run."""
        return fingerprint(self.options, self.dataset.table, self.model_digest, self.accelerator.num_processes)

    def run(self) -> bool:
        """Train to the last step. Returns False if Ctrl-C ended it early; the network is saved either way."""
        if not self.step:
            self.previews.at_first()
        self.processes.wait()
        started, self.first_step = time.perf_counter(), self.step
        progress = tqdm(total=self.plan.max_steps, initial=self.step, unit="step", desc="training", smoothing=0.1)
        with stop_on_interrupt() as self.asked_to_stop, self._rescue(), progress:
            for self.epoch in range(self.epoch, self.plan.epochs + 1):  # noqa: B020
                self._start_epoch()
                for batch in self._rest_of_epoch():
                    self._start_step()
                    self._backward(batch)
                    self.position += 1
                    if not self.plan.ends_step(self.position - 1):
                        continue
                    self._add_up(self.position - 1)
                    self._update()
                    progress.update()
                    self._after_step(progress)
                    if self._is_over():
                        break
                if self._is_stopped() or self._stops_early():
                    break
                self._after_epoch()
                if self._is_over():
                    break
                self.position = 0
            self.exchange.finish()
            aside = self.previews.seconds + (self.validation.seconds if self.validation else 0.0)
            self.seconds_per_step = (time.perf_counter() - started - aside) / max(1, self.step - self.first_step)
            finished = self.step >= self.plan.max_steps or self._stops_early()
            self._save_last(finished)
        return finished

    def _is_over(self) -> bool:
        return self.step >= self.plan.max_steps or self._is_stopped() or self._stops_early()

    def _is_stopped(self) -> bool:
        """Whether Ctrl-C ends the run; of several processes all must know first."""
        return self.exchange.stopping(self.asked_to_stop())

    def _stops_early(self) -> bool:
        """Whether --early_stopping_patience ends the run."""
        return self.validations.is_exhausted(self.options.validation.early_stopping_patience)

    @contextmanager
    def _rescue(self):
        """If a picture cannot be read, memory runs out or anything else goes wrong, keep what was trained until then.

        All processes end together; the main one says why.
        """
        try:
            with self._failing_together():
                yield
        except NotSaved:  # it says where the weights are
            raise
        except UserError as error:
            error.args = (f"{error}{self._save_what_is_good()}",)
            raise
        except (OSError, SafetensorError, UnicodeError) as error:  # a full disk, say
            raise RunFailed(f"{one_line(error)}{self._save_what_is_good()}") from error
        except Exception:
            tqdm.write(self._save_what_is_good().removeprefix("; "))
            raise

    @contextmanager
    def _failing_together(self):
        try:
            yield
        except Exception as error:
            if not getattr(error, "told", False):
                self.exchange.fail()
            full = isinstance(error, torch.OutOfMemoryError)
            self.processes.announce(RunFailed(f"the GPU's memory is full; {LESS_MEMORY}") if full else error)

    def _save_what_is_good(self) -> str:
        """Save the network as it is, unless it holds a NaN, and say where; nothing if no step was done."""
        path = self.files.step_path(self.step)
        if not self.step or path in self.files.written:
            return ""
        try:
            self.files.save(path, self.network.module, self.metadata.at(self.step, self.epoch - 1))
        except NotSaved as error:
            return f"; {error}"
        except UserError:
            return ""
        return f"; what was trained until then is in {path}"

    def _start_epoch(self) -> None:
        """The network trains; the frozen model (which has no dropout) does so only for gradient checkpointing."""
        self.network.module.train()
        checkpointing = self.options.training.gradient_checkpointing
        self.model.unet.train(checkpointing)
        self.model.text_encoder.train(checkpointing and self.network.trains_text_encoder)
        seed_everything(self.seed, self.epoch)
        self.network.module.on_epoch_start(self.model.text_encoder, self.model.unet)

    def _rest_of_epoch(self) -> Iterator[Batch | None]:
        """The batches of this epoch from the position on: all of them, unless the run is resumed within it.

        None are left if it was killed after its last step and before its last file.
        """
        is_used_up = self.position == self.plan.turns_per_epoch or self._is_over()
        return iter(()) if is_used_up else self.loader.epoch(self.epoch, self.position)

    def _start_step(self) -> None:
        """Let a network that draws something for each step, as DyLoRA its rank, do so: once a step, alike in all processes."""
        hook = getattr(self.network.module, "on_step_start", None)
        if hook is not None and self.plan.starts_step(self.position):
            seed_everything(self.seed, self.epoch, self.plan.first_of_step(self.position))
            hook(self.model.text_encoder, self.model.unet)

    def _backward(self, batch: Batch | None) -> None:
        """Forward and backward of one batch; its loss is divided by the number of batches in its step.

        What is random depends on the batch's place in the epoch, not on the process. None: no batch is left for this process.
        """
        if batch is None:
            return
        seed_everything(self.seed, *batch.key, 0)
        loss = self.loss(batch)
        if self.options.training.on_nonfinite_loss == "skip" and not torch.isfinite(loss):
            self.skipped += 1
            tqdm.write(f"skipped a batch: {describe_nonfinite(loss.item(), self.step + 1, batch.paths)}")
            return
        if self.exchange.active:
            self.exchange.note_loss(batch.key[1] - self.plan.first_of_step(self.position), loss)
        else:
            self.losses.add(self.step + 1, loss, batch.paths)
        self.has_gradients = True
        self.accelerator.backward(loss / self.plan.group_size(self.position))

    def _add_up(self, turn: int) -> None:
        """Exchange what the processes found in the step that this turn ended; alone there is nothing to add."""
        if self.exchange.active:
            epoch, first = self.epoch, self.plan.first_of_step(turn)
            self.exchange.add_up(self.step + 1, lambda slot: self.dataset.paths(epoch, first + slot), stop=self.asked_to_stop())
            self.has_gradients = any(parameter.grad is not None for parameter in self.network.parameters)
            seed_everything(self.seed, epoch, first, 0, 1)  # optimizers that draw numbers draw the same ones in all processes

    def loss(self, batch: Batch) -> torch.Tensor:
        """The diffusion loss of a batch, a float32 scalar on the device."""
        latents, context = self._latents(batch), self._context(batch)
        noised = self.objective.noised(latents)
        with self.accelerator.autocast():
            prediction = predict_noise(self.model.unet, noised.noisy, noised.t, context)
        masks = None if batch.masks is None else batch.masks.to(latents.device, non_blocking=True)
        losses = self.objective.losses(prediction, noised, masks)
        return (losses * batch.loss_weights.to(losses.device, non_blocking=True)).mean()

    def _validation_losses(self, batch: Batch, noise_of: Callable[[torch.Size], torch.Tensor], t: torch.Tensor) -> torch.Tensor:
        """Squared errors (B,) at given noise and timesteps, without any weights, so that runs can be compared."""
        latents = self._latents(batch)
        noised = self.objective.at(latents, noise_of(latents.shape), t)
        with self.accelerator.autocast():
            prediction = predict_noise(self.model.unet, noised.noisy, t, self._context(batch))
        return (prediction.float() - noised.target.float()).square().flatten(1).mean(dim=1)

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
        with torch.set_grad_enabled(self.network.trains_text_encoder and torch.is_grad_enabled()), self.accelerator.autocast():
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
        if self.average is not None:
            self.average.update()

    def _after_step(self, progress: tqdm) -> None:
        self.step += 1
        self.next = (self.epoch, self.position)
        if self.losses.current is not None:
            progress.set_postfix(loss=f"{self.losses.current:.4f}", average=f"{self.losses.average:.4f}", refresh=False)
        rates = self.schedule.get_last_lr()
        self.losses.add_rates(self.step, self.network.group_names, rates)
        self.tracker.log_step(self.step, self.losses, rates, self.network.group_names, found_rates(self.optimizer))
        interval = self.options.output.save_every_n_steps
        saves = bool(interval) and self.step % interval == 0
        if saves:
            self._save(self.files.step_path(self.step), self.epoch - 1)
            self.files.remove_old_step(self.step, interval)
        self.previews.after_step(self.step)
        if self.validation is not None and self.validation.due_after_step(self.step):
            self._validate("step", self.step)
        if saves and self.states.at_saves:  # last: a run that goes on from here does nothing of this step again
            self._save_state(self.states.step_path(self.step))
            self.processes.on_main(lambda: self.states.remove_old_step(self.step, interval))

    def _after_epoch(self) -> None:
        is_whole = self.position == self.plan.turns_per_epoch  # else --max_train_steps ended the run within it
        self.losses.flush()
        self.tracker.log_epoch(self.epoch, self.losses)
        interval = self.files.epoch_interval(self.plan.epochs)
        saves = bool(interval) and self.epoch % interval == 0 and self.epoch < self.plan.epochs
        if saves:
            self._save(self.files.epoch_path(self.epoch), self.epoch)
            self.files.remove_old_epoch(self.epoch, interval)
        self.previews.after_epoch(self.epoch, self.step)
        if is_whole and self.validation is not None and self.validation.due_after_epoch(self.epoch):
            self._validate("epoch", self.epoch)
        if is_whole:
            self.next = (self.epoch + 1, 0)
        if saves and self.states.at_saves:
            self._save_state(self.states.epoch_path(self.epoch))
            self.processes.on_main(lambda: self.states.remove_old_epoch(self.epoch, interval))

    def _validate(self, kind: str, number: int) -> None:
        """Measure the loss on the pictures held out (once for the same weights), and keep the best file."""
        if not self.validations.is_done_at(self.step):
            loss = self._validation_loss()
            is_best = self.validations.add(self.step, loss)
            if isinstance(self.schedule, OnPlateau):
                self.schedule.validated(loss)
            tqdm.write(f"validation after step {self.step}: {loss:.5f}{', the best so far' if is_best else ''}")
            if is_best:
                self._save(self.files.best_path(), self.epoch - 1)
        self.losses.flush()
        self.tracker.log_validation(kind, number, self.validations.history[-1][1], self.losses)

    def _validation_loss(self) -> float:
        with self.weights_to_use(), evaluating(self.network.module, self.model.unet, self.model.text_encoder):
            return self.validation.loss(self._validation_losses)

    def _save(self, path: Path, epoch: int) -> None:
        self.losses.flush()
        self.processes.on_main(lambda: self.files.save(path, self.network.module, self.metadata.at(self.step, epoch)))
        tqdm.write(f"saved {path}")

    def _save_state(self, folder: Path) -> None:
        state = capture(self)
        self.processes.on_main(lambda: self.states.save(folder, state))
        tqdm.write(f"saved {folder}")

    def _save_last(self, finished: bool) -> None:
        """The state first, so that no kill leaves a file that claims more than can be resumed; then the weights, validated."""
        if not self.step:
            raise RunFailed("stopped before the first step was done; nothing was saved")
        if self.states.at_end:
            self._save_state(self.states.final_path() if finished else self.states.step_path(self.step))
        if finished and self.validation is not None and not self.validations.is_done_at(self.step):
            self._validate("step", self.step)
        path = self.files.final_path() if finished else self.files.step_path(self.step)
        self._save(path, self.plan.epochs if finished else self.epoch - 1)
