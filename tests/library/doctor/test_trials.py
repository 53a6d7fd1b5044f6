from __future__ import annotations

import pytest

from library.command_line import option_names
from library.doctor.trials import CPU, Machine, Trial, this_machine, trials
from library.training.options import TrainNetworkOptions, parse_options

A100 = Machine("cuda", 2, True)
MACHINES = {
    "cpu": Machine(), "cpu with bf16": Machine(bf16=True), "old card": Machine("cuda", 1), "two cards": A100,
    "apple": Machine("mps", 1, True),
}  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_every_trial_has_a_reference_before_it_and_words_that_are_options(machine):
    seen: list[str] = []
    for trial in trials(machine):
        assert trial.reference in (seen if seen else [None])
        seen.append(trial.name)
        if not trial.missing:
            parse_options(["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", *trial.arguments])
        named = {word[2:].split("=")[0] for word in trial.arguments if word.startswith("--")}
        assert named <= set(option_names(TrainNetworkOptions))
    assert len(set(seen)) == len(seen) and seen[0] == CPU


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_no_machine_leaves_a_way_out_of_the_table(machine):
    missing = {"bf16", "fp16", "AdamW8bit", "xformers", "full_bf16", "full_fp16", "two GPUs", "torch_compile", "CUDA graphs"}
    assert missing <= {trial.name for trial in trials(machine)}


def by_name(machine: Machine) -> dict[str, Trial]:
    return {trial.name: trial for trial in trials(machine)}


def test_what_a_machine_cannot_use_has_its_reason():
    plain, old, new = (
        by_name(Machine(reasons={"xformers": "it needs an NVIDIA card"})),
        by_name(MACHINES["old card"]),
        by_name(A100),
    )
    assert plain["fp16"].missing == "fp16 needs a GPU" and "no bf16 units" in plain["bf16"].missing
    assert plain["xformers"].missing == "it needs an NVIDIA card" and not plain["AdamW8bit"].missing
    assert plain["two GPUs"].missing == "it needs an NVIDIA GPU" and old["two GPUs"].missing == "1 GPU here"
    assert not old["fp16"].missing and old["full_bf16"].missing and "nf4 base, fp16" in old
    assert not any(trial.missing for trial in new.values()) and new["two GPUs"].processes == 2


def test_a_card_draws_other_numbers_than_the_cpu():
    """So what is trained there is compared with float32 there, and that alone with the CPU."""
    new = by_name(A100)
    assert new[CPU].on_cpu and new["float32, GPU"].reference == CPU and not new["float32, GPU"].same_noise
    assert new["bf16"].reference == "float32, GPU" and new["bf16"].same_noise
    assert by_name(Machine())["int8 base, no"].reference == CPU


def test_this_machine_keeps_the_reasons():
    assert this_machine({"xformers": "broken"}).reasons == {"xformers": "broken"}
