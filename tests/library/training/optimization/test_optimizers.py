from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from library.errors import UserError
from library.testing import full_size_header
from library.training.checks.estimates import file_sizes, network_parameters
from library.training.checks.trial import trial_optimizer
from library.training.optimization.fused_backward import check_fused_backward, step_in_backward
from library.training.optimization.optimizers import (
    OPTIMIZERS,
    averaged_weights,
    create_optimizer,
    found_rates,
    optimizer_name,
    spec_named,
)
from library.training.optimization.schedules import create_schedule, schedule_facts
from library.training.options import OptimizerOptions, parse_options

CPU = torch.device("cpu")
NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]


def groups():
    return [{"params": [torch.nn.Parameter(torch.ones(64, 64))], "lr": 0.5}]


def test_adamw_is_the_default_and_groups_keep_their_rate():
    optimizer, name = create_optimizer(OptimizerOptions(learning_rate=0.1), groups(), CPU)
    assert isinstance(optimizer, torch.optim.AdamW) and name == "torch.optim.adamw.AdamW"
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.option("optimizer_args")
def test_arguments_reach_the_optimizer_and_its_name():
    options = OptimizerOptions(optimizer_type="adamw", optimizer_args=["weight_decay=0.2", "betas=(0.8, 0.9)"])
    optimizer, name = create_optimizer(options, groups(), CPU)
    assert optimizer.param_groups[0]["weight_decay"] == 0.2 and optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert name.endswith("(weight_decay=0.2,betas=(0.8, 0.9))")


def test_adamw_in_one_call_is_the_plain_formula_in_float32():
    """Loshchilov and Hutter 2019, algorithm 2, with the gradients of a loss; and another way of torch's can be chosen."""
    options = OptimizerOptions(learning_rate=0.1)
    optimizer, _ = create_optimizer(options, groups(), CPU)
    assert optimizer.param_groups[0]["fused"]
    parameter = optimizer.param_groups[0]["params"][0]
    weight, mean, square = parameter.detach().double().clone(), 0.0, 0.0
    for step in range(1, 6):
        gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        parameter.grad = gradient.clone()
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient.double(), 0.999 * square + 0.001 * gradient.double() ** 2
        weight = weight * (1 - 0.5 * 0.01) - 0.5 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-5)
    chosen, _ = create_optimizer(OptimizerOptions(optimizer_args=["foreach=True"]), groups(), CPU)
    assert chosen.param_groups[0]["foreach"] and not chosen.param_groups[0]["fused"]


@pytest.mark.option("use_8bit_adam")
def test_adamw8bit_steps_on_a_cpu():
    optimizer, name = create_optimizer(OptimizerOptions(use_8bit_adam=True), groups(), CPU)
    parameter = optimizer.param_groups[0]["params"][0]
    before = parameter.detach().clone()
    parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    assert name == "bitsandbytes.optim.adamw.AdamW8bit"
    assert torch.isfinite(parameter).all() and (parameter != before).all()


@pytest.mark.option("use_lion_optimizer")
def test_the_old_flag_means_lion():
    assert optimizer_name(OptimizerOptions(use_lion_optimizer=True)) == "Lion" and optimizer_name(OptimizerOptions()) == "AdamW"


@pytest.mark.option("optimizer_type")
def test_sgd_nesterov_has_momentum_unless_given():
    optimizer, _ = create_optimizer(OptimizerOptions(optimizer_type="SGDNesterov"), groups(), CPU)
    assert optimizer.param_groups[0]["momentum"] == 0.9 and optimizer.param_groups[0]["nesterov"]
    optimizer, _ = create_optimizer(
        OptimizerOptions(optimizer_type="SGDNesterov", optimizer_args=["momentum=0.5"]), groups(), CPU
    )
    assert optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize("name", ["torch.optim.Adagrad", "Adagrad"])
def test_any_class_by_path_and_torch_classes_by_name(name):
    optimizer, _ = create_optimizer(OptimizerOptions(optimizer_type=name), groups(), CPU)
    assert isinstance(optimizer, torch.optim.Adagrad)


@pytest.mark.parametrize(
    "options, part",
    [
        ({"optimizer_type": "AdmW"}, "AdamW"),
        ({"optimizer_type": "no_such_package.Thing"}, "pip install no_such_package"),
        ({"optimizer_type": "torch.optim.AdamWW"}, "torch.optim.AdamW"),
        ({"optimizer_type": "."}, "package.module.Class"),
        ({"optimizer_type": "..optim.AdamW"}, "package.module.Class"),
        ({"optimizer_type": "torch.optim.SparseAdam"}, "sparse"),
        ({"optimizer_type": "torch.optim.Optimizer"}, "is no optimizer"),
        ({"optimizer_type": "pathlib.Path"}, "is no optimizer"),
        ({"optimizer_args": ["weight_decy=1"]}, "weight_decy"),
        ({"optimizer_args": ["weight_decay"]}, "key=value"),
    ],
)
def test_wrong_input(options, part):
    with pytest.raises(UserError, match=part):
        create_optimizer(OptimizerOptions(**options), groups(), CPU)


PACKAGES = {
    "Lion": ("lion_pytorch", "lion-pytorch"), "Prodigy": ("prodigyopt", "prodigyopt"),
    "DAdaptation": ("dadaptation", "dadaptation"), "DAdaptAdanIP": ("dadaptation.experimental", "dadaptation"),
    "RAdamScheduleFree": ("schedulefree", "schedulefree"), "AdamW8bit": ("bitsandbytes.optim", "bitsandbytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_reported_with_what_to_install(name, monkeypatch):
    module, package = PACKAGES[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}$"):
        create_optimizer(OptimizerOptions(optimizer_type=name), groups(), CPU)
    listed = Path(__file__).parents[4].joinpath("requirements.txt").read_text("utf-8")
    listed += Path(__file__).parents[4].joinpath("requirements-extras.txt").read_text("utf-8")
    assert f"\n{package}==" in listed, "the extras name what people are told to install"


# ---------------------------------------------------------------- every name


def trained(name: str, steps: int = 10, rate: float = 1e-2, **options) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A weight after some steps on a slope, and its optimizer."""
    chosen = OptimizerOptions(optimizer_type=name, learning_rate=rate, **options)
    optimizer, _ = create_optimizer(chosen, [{"params": [torch.nn.Parameter(torch.zeros(64, 64))]}], CPU)
    parameter = optimizer.param_groups[0]["params"][0]
    for _ in range(steps):
        (parameter * torch.linspace(0.5, 1.5, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameter.detach(), optimizer


EXTRAS = {"Lion": "lion_pytorch", "Prodigy": "prodigyopt"} | dict.fromkeys(
    (n for n in OPTIMIZERS if n.startswith("DAdapt")), "dadaptation"
)
EXTRAS |= dict.fromkeys((n for n in OPTIMIZERS if n.endswith("ScheduleFree")), "schedulefree")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_goes_downhill_in_any_case(name):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], reason="an extra of requirements-extras.txt")
    weight, optimizer = trained(name.upper(), rate=1.0 if name.startswith(("DAdapt", "Prodigy")) else 1e-2)
    assert torch.isfinite(weight).all() and weight.mean() < 0
    assert type(optimizer).__name__.lower() in {name.lower(), "sgd", "sgd8bit", "dadaptadam"}


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedLion8bit", "SGDNesterov8bit"])
def test_eight_bit_names_keep_eight_bits_also_on_a_cpu(name):
    _, optimizer = trained(name)
    (state,) = optimizer.state.values()
    assert state["state1"].dtype == torch.uint8


def test_trap_5_11_dadaptation_is_the_class_of_the_guides():
    pytest.importorskip("dadaptation", reason="an extra of requirements-extras.txt")
    for name, module in {"DAdaptation": "dadaptation.dadapt_adam", "DAdaptAdamPreprint": "dadaptation.experimental"}.items():
        _, described = create_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=1), groups(), CPU)
        assert described.startswith(module), "0.6 meant DAdaptAdam, later versions DAdaptAdamPreprint, which has its own name"


# ---------------------------------------------------------------- rules


@pytest.mark.option("learning_rate")
def test_adafactor_with_relative_step_takes_no_rates_and_says_so(capsys):
    two = [{"params": [torch.nn.Parameter(torch.ones(4, 4))], "lr": rate} for rate in (0.1, 0.2)]
    options = OptimizerOptions(optimizer_type="AdaFactor", learning_rate=1e-3, unet_lr=0.1, lr_scheduler="cosine")
    optimizer, _ = create_optimizer(options, two, CPU)
    assert [group["lr"] for group in optimizer.param_groups] == [None, None]
    assert "--learning_rate, --unet_lr, --lr_scheduler are not used" in capsys.readouterr().out
    schedule = create_schedule(options, optimizer, 10)
    assert type(schedule).__name__ == "AdafactorSchedule" and schedule.get_last_lr() == [1e-3, 1e-3]
    assert schedule_facts(options, optimizer) == {"ss_lr_scheduler": "adafactor:0.001", "ss_learning_rate": None}


@pytest.mark.option("max_grad_norm")
def test_adafactor_with_rates_of_its_own(capsys):
    words = ["relative_step=False", "scale_parameter=False"]
    options = OptimizerOptions(optimizer_type="adafactor", learning_rate=0.3, optimizer_args=words)
    optimizer, _ = create_optimizer(options, groups(), CPU)
    assert optimizer.param_groups[0]["lr"] == 0.5 and schedule_facts(options, optimizer) == {}
    said = capsys.readouterr().out
    assert (
        "constant_with_warmup" in said
        and "--max_grad_norm=0" in said
        and "clip_threshold" not in said.split("(clip_threshold)")[1]
    )
    weight, _ = trained(
        "AdaFactor", optimizer_args=words, max_grad_norm=0, lr_scheduler="constant_with_warmup", lr_warmup_steps=1
    )
    assert weight.mean() < 0 and not capsys.readouterr().out


def test_adafactor_s_warmup_init_switches_relative_step_on(capsys):
    options = OptimizerOptions(optimizer_type="AdaFactor", optimizer_args=["warmup_init=True", "relative_step=False"])
    optimizer, _ = create_optimizer(options, groups(), CPU)
    assert optimizer.param_groups[0]["relative_step"] and "warmup_init needs relative_step" in capsys.readouterr().out


class _Found(torch.optim.SGD):
    """An optimizer that finds its rate, as far as the rules look at one."""

    __module__ = "prodigyopt.prodigy"

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["d"] = 0.25


class _Averaging(torch.optim.SGD):
    """A schedule-free optimizer, as far as the trainer sees one: in eval mode its weights are others."""

    __module__ = "schedulefree.sgd"

    def _set(self, factor: float) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(factor)

    def train(self):
        self._set(3.0)

    def eval(self):
        self._set(1 / 3)


@pytest.fixture
def stand_ins(monkeypatch):
    """Optimizers of packages that need not be installed, under their names."""
    for cls in (_Found, _Averaging):
        module = ModuleType(cls.__module__)
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, cls.__module__, module)
    return {"found": "prodigyopt.prodigy._Found", "averaging": "schedulefree.sgd._Averaging"}


def test_optimizers_that_find_their_rate_take_one_and_log_it(stand_ins, capsys):
    options = OptimizerOptions(optimizer_type=stand_ins["found"], learning_rate=1e-4)
    optimizer, _ = create_optimizer(options, [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1e-4}], CPU)
    assert "1 is usual" in capsys.readouterr().out and found_rates(optimizer) == [0.25e-4]
    several = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in (1.0, 0.5)]
    with pytest.raises(UserError, match="leave out --unet_lr, --text_encoder_lr"):
        create_optimizer(options, several, CPU)
    assert found_rates(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])) is None


def test_averaged_weights_are_there_to_be_used_and_gone_bit_for_bit(stand_ins, capsys):
    torch.manual_seed(0)
    options = OptimizerOptions(optimizer_type=stand_ins["averaging"], learning_rate=1e-4, lr_scheduler="cosine")
    weight = torch.nn.Parameter(torch.randn(50))
    optimizer, _ = create_optimizer(options, [{"params": [weight]}], CPU)
    assert "warmup_steps=100" in capsys.readouterr().out
    before = weight.detach().clone()
    with averaged_weights(optimizer):
        torch.testing.assert_close(weight, before / 3)
        assert not torch.equal(weight / 3 * 3 * 3, before)
    assert torch.equal(weight, before)
    schedule = create_schedule(options, optimizer, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [1e-4]
    plain = torch.optim.SGD([weight])
    with averaged_weights(plain):
        assert torch.equal(weight, before)


# ---------------------------------------------------------------- --fused_backward_pass


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "SGDNesterov", "AdaFactor"])
def test_fused_steps_are_the_ordinary_ones_bit_for_bit(name):
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        parts = [{"params": list(model[i].parameters()), "lr": rate} for i, rate in ((0, 0.1), (2, 0.05))]
        options = OptimizerOptions(optimizer_type=name, lr_scheduler="linear")
        optimizer, _ = create_optimizer(options, parts, CPU)
        schedule = create_schedule(options, optimizer, 5)
        if fused:
            step_in_backward(optimizer, max_grad_norm=0)
        for _ in range(4):
            model(torch.randn(8, 64)).square().mean().backward()
            if fused:
                assert all(p.grad is None for p in model.parameters())
            else:
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_fused_steps_clip_each_parameter_by_itself():
    weight = torch.nn.Parameter(torch.zeros(4))
    step_in_backward(torch.optim.SGD([weight], lr=1.0), max_grad_norm=0.5)
    (weight * 100).sum().backward()
    assert weight.norm().item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    "words, processes, part",
    [
        (["--gradient_accumulation_steps=2"], 1, "gradient_accumulation_steps"),
        (["--mixed_precision=fp16"], 1, "bf16"),
        ([], 2, "several processes"),
        (["--optimizer_type=prodigyopt.prodigy._Found"], 1, "looks at all gradients"),
    ],
)
def test_what_cannot_be_fused_is_refused(words, processes, part):
    options = parse_options([*NEEDED, "--fused_backward_pass", *words])
    with pytest.raises(UserError, match=f"--fused_backward_pass: .*{part}"):
        check_fused_backward(options.optimizer, options.training, processes)


# ---------------------------------------------------------------- traits


@pytest.mark.parametrize(
    "name, traits",
    [
        ("AdamW", {"fused_on_cpu"}),
        ("torch.optim.AdamW", {"fused_on_cpu"}),
        ("torch.optim.Adam", set()),
        ("adamw8BIT", {"float32_math"}),
        ("bitsandbytes.optim.Adam8bit", {"float32_math"}),
        ("PagedAdamW", {"float32_math", "paged"}),
        ("bitsandbytes.optim.adamw.PagedAdamW", {"float32_math", "paged"}),
        ("Prodigy", {"finds_rate"}),
        ("prodigyopt.prodigy.Prodigy", {"finds_rate"}),
        ("dadaptation.SomeNewOne", {"finds_rate"}),
        ("schedulefree.SGDScheduleFree", {"schedule_free"}),
        ("transformers.optimization.Other", set()),
    ],
)
def test_traits_belong_to_the_class_however_it_is_named(name, traits):
    spec = spec_named(name)
    every = ("fused_on_cpu", "float32_math", "paged", "finds_rate", "schedule_free")
    assert {trait for trait in every if getattr(spec, trait)} == traits


def test_a_state_is_as_large_as_the_optimizer_s():
    needed = {}
    for name in ("Lion8bit", "AdamW8bit", "Lion", "AdamW", "Prodigy"):
        needed[name] = file_sizes(parse_options([*NEEDED, f"--optimizer_type={name}"]), full_size_header()).state
    parameters = network_parameters(parse_options(NEEDED).network, full_size_header())
    assert {name: size / parameters for name, size in needed.items()} == {
        "Lion8bit": 5, "AdamW8bit": 6, "Lion": 8, "AdamW": 12, "Prodigy": 20
    }  # fmt: skip


# ---------------------------------------------------------------- the trial


@pytest.mark.parametrize(
    "words, part",
    [
        ({"optimizer_args": ["lr=1e-3"]}, "--optimizer_args lr=1e-3: .*--learning_rate"),
        ({"optimizer_args": ["amsgrad=x"]}, "amsgrad=x: AdamW takes true or false"),
        ({"optimizer_args": ["betas=0.9,0.99,0.999"]}, "betas=0.9,0.99,0.999: AdamW takes 2 numbers"),
        ({"optimizer_type": "SGDNesterov", "optimizer_args": ["momentum=0"]}, "momentum"),
        ({"optimizer_type": "Rprop", "optimizer_args": ["step_sizes=none,none"]}, "Rprop fails in its first step"),
    ],
)
def test_an_optimizer_that_cannot_step_is_found_before_a_model_loads(words, part):
    with pytest.raises(UserError, match=part):
        trial_optimizer(OptimizerOptions(**words))


def test_a_first_step_that_fails_is_one_line(monkeypatch):
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no\nkernel")

    class Exploding(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim, "Failing", Failing, raising=False)
    monkeypatch.setattr(torch.optim, "Exploding", Exploding, raising=False)
    with pytest.raises(UserError, match="--optimizer_type Failing fails in its first step: no kernel; change --optimizer_args"):
        trial_optimizer(OptimizerOptions(optimizer_type="Failing"))
    with pytest.raises(UserError, match="--optimizer_type Exploding makes NaN or infinity"):
        trial_optimizer(OptimizerOptions(optimizer_type="Exploding"))


def test_the_trial_prints_nothing(capsys):
    pytest.importorskip("prodigyopt", reason="an extra of requirements-extras.txt")
    chosen = OptimizerOptions(optimizer_type="Prodigy", learning_rate=1, optimizer_args=["decouple=True", "weight_decay=0.1"])
    trial_optimizer(chosen)
    assert capsys.readouterr().out == ""
    create_optimizer(chosen, groups(), CPU)
    assert "decoupled weight decay" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["false", "False", "no", "0"])
def test_adafactor_s_relative_step_is_off_in_any_spelling(text, capsys):
    words = [f"scale_parameter={text}", f"relative_step={text}", f"warmup_init={text}"]
    optimizer, _ = create_optimizer(OptimizerOptions(optimizer_type="AdaFactor", optimizer_args=words), groups(), CPU)
    assert [optimizer.param_groups[0][key] for key in ("scale_parameter", "relative_step", "warmup_init")] == [False] * 3
    assert "computes its own learning rates" not in capsys.readouterr().out


def test_all_arguments_in_one_pair_of_quotes_are_the_same_arguments():
    one, many = (
        create_optimizer(OptimizerOptions(optimizer_args=words), groups(), CPU)
        for words in (["weight_decay=0.5 betas=0.8,0.9 amsgrad=true"], ["weight_decay=0.5", "betas=0.8,0.9", "amsgrad=True"])
    )
    assert one[1] == many[1] == "torch.optim.adamw.AdamW(weight_decay=0.5,betas=(0.8, 0.9),amsgrad=True)"
    assert one[0].defaults == many[0].defaults
