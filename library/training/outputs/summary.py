"""What a run prints before its first step and after its last one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tqdm import tqdm

from library.devices import DTYPES, peak_memory_bytes
from library.errors import counted
from library.training.loop import Outcome, Stop
from library.training.network import TrainedNetwork
from library.training.outputs.loss_plot import try_loss_plot
from library.training.plan import Plan

if TYPE_CHECKING:
    from library.training.setup import Run


def network_summary(network: TrainedNetwork, module_name: str, save_precision: str | None) -> str:
    """What is trained: the network module, and what it says of itself."""
    if hasattr(network.module, "summary"):
        summary = network.module.summary(DTYPES[save_precision] if save_precision else None)
    else:
        summary = f"{sum(p.numel() for p in network.parameters):,} trainable parameters"
    return f"{module_name}: {summary}"


def print_plan(plan: Plan, network: str, seed: int) -> None:
    """The length of the run, and the network by its `network_summary`."""
    print(f"network {network}")
    shared = f" ({plan.accumulation} on each of {plan.processes} processes)" if plan.processes > 1 else ""
    print(
        f"plan: {counted(plan.max_steps, 'step')} of {counted(plan.batches_per_step, 'batch', 'batches')}{shared}, "
        f"{counted(plan.batches_per_epoch, 'batch', 'batches')} an epoch, {counted(plan.epochs, 'epoch')}; seed {seed}"
    )


def summarize(run: Run, outcome: Outcome, seconds: float, skipped: int) -> None:
    """The last screen: where the files are, the final loss, the speed, the memory. skipped: batches, of all processes."""
    name, files, losses, validations = run.options.output.output_name, run.files, run.losses, run.validator.record
    step, finished = outcome.progress.step, outcome.is_finished
    plot = files.folder / f"{run.options.output.file_stem}-loss.png"
    drawn = try_loss_plot(losses, plot, name or "loss", validations.history)
    run.tracker.finish()
    if files.uploads:
        files.uploads.finish()
    last = files.written[-1]
    peak = peak_memory_bytes(run.machine.device)
    rows = [("LoRA" if finished else "LoRA so far", str(last)), ("loss plot", drawn)]
    if run.page.is_written and run.page.path.is_file():
        rows.append(("page", f"{run.page.path} (open it in a browser)"))
    if validations.best is not None:
        at, loss = validations.best
        rows.append(("best", f"{files.best_path()} (validation loss {loss:.5f} after step {at})"))
    rows += [("also saved", str(path)) for path in files.written[:-1]]
    if losses.average is not None:
        rows.append(("loss", f"{losses.average:.4f} (mean of the last epoch)"))
    rows.append(("speed", f"{outcome.seconds_per_step:.3f} s a step, {counted(outcome.steps, 'step')} in {seconds:.0f} s"))
    if peak:
        rows.append(("peak memory", f"{peak / 2**30:.2f} GiB"))
    if skipped:
        rows.append(("skipped", f"{counted(skipped, 'batch', 'batches')} whose loss was not finite"))
    if outcome.stop is Stop.EARLY:
        rows.append(("stopped early", f"after step {step}: {validations.without_improvement} validations were not better"))
    if not finished and run.states.at_end:
        rows.append(("to go on", f"run the same command with --resume={run.states.step_path(step)}"))
    elif not finished:
        rows.append(("to go on", f"run the same command with --network_weights={last} --dim_from_weights"))
    width = max(len(label) for label, _ in rows)
    tqdm.write("")
    for label, value in rows:
        tqdm.write(f"  {label:<{width}}  {value}")
