"""Schedules, moving averages, configuration files and logs."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from torch import nn

from effkern.training import (
    ConfigError,
    CsvLog,
    Ema,
    Recipe,
    TensorBoardLog,
    learning_rate,
    load_config,
    make_optimizer,
    parameter_groups,
    parse_config,
)
from effkern.training.recipe import set_learning_rate


def rates(*fractions: float, **options) -> list[float]:
    return [learning_rate(Recipe(epochs=1, **{"lr": 1.0, **options}), f) for f in fractions]


def test_schedules():
    assert rates(0, 0.49, 0.5, 0.74, 0.75, 1, schedule="step") == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(0, 0.79, 0.8, schedule="step", milestones=(0.8,), factor=0.5) == pytest.approx([1, 1, 0.5])
    assert rates(0, 0.25, 1, schedule="linear") == pytest.approx([1, 0.75, 0])
    assert rates(0, 0.5, 1, 1.2, schedule="cosine") == pytest.approx([1, 0.5, 0, 0])
    assert rates(0, 1, schedule="constant") == [1, 1]
    assert rates(0, 0.25, 1) == rates(0, 0.25, 1, schedule="cosine", warmup=0.25) == pytest.approx([0.04, 1, 0])


def test_warmup_goes_before_any_schedule():
    # DS-Net: 5 of 150 epochs from 1e-5 to 0.08
    options = {"lr": 0.08, "warmup": 5 / 150, "warmup_from": 1e-5 / 0.08, "schedule": "cosine"}
    assert rates(0, 2.5 / 150, 5 / 150, 1, **options) == pytest.approx([1e-5, 0.040005, 0.08, 0])
    assert rates(0.05, 0.1, 0.5, schedule="step", warmup=0.1, warmup_from=0.0) == pytest.approx([0.5, 1, 0.1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ema", 1.0),
        ("accumulate", 0),
        ("batch_size", 0),
        ("milestones", (0.7, 0.5)),
        ("milestones", (1.0,)),
        ("lr", 0),
        ("epochs", float("inf")),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("label_smoothing", 1.1),
        ("warmup_from", -0.1),
        ("factor", 0.0),
        ("clip", 0.0),
        ("budget_s", 0.0),
        ("seed", 2**63),
    ],
)
def test_senseless_recipes_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: must be"):
        Recipe(**{"epochs": 1, name: value})


def test_momentum_looks_ahead_where_it_is_asked_to():
    """Two steps of gradient 1 at rate 1: v = 0.5 v + g, and with Nesterov's the step is g + 0.5 v."""
    for nesterov, want in ((True, -1.5 - 1.75), (False, -1 - 1.5)):
        weight = nn.Parameter(torch.zeros(1))
        recipe = Recipe(epochs=1, lr=1.0, momentum=0.5, nesterov=nesterov, weight_decay=0.0)
        optimizer = make_optimizer([{"params": [weight]}], recipe)
        for _ in range(2):
            weight.grad = torch.ones(1)
            optimizer.step()
        assert weight.item() == want


def test_groups_learn_at_their_own_rate():
    recipe = Recipe(epochs=1, lr=0.1, weight_decay=0.01, optimizer="adam")
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.bias.requires_grad_(False)
    optimizer = make_optimizer(parameter_groups(first, recipe) + parameter_groups(second, recipe, 0.5), recipe)
    set_learning_rate(optimizer, 0.04)
    assert type(optimizer) is torch.optim.Adam
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        (0.04, 0.01, 1),
        (0.04, 0, 1),
        (0.02, 0.01, 1),
    ]
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        make_optimizer(parameter_groups(first.requires_grad_(False), recipe), recipe)


def test_ema_follows_weights_and_statistics_by_hand():
    net = nn.BatchNorm1d(1)
    ema = Ema(net, decay=0.75, warmup=False)
    with torch.no_grad():
        net.weight.fill_(3.0)
    net(torch.tensor([[0.0], [4.0]]))  # running mean 0.1 * 2
    ema.update(net)
    assert ema.module.weight.item() == 1.5 and ema.module.running_mean.item() == pytest.approx(0.05)
    assert ema.module.num_batches_tracked == 1
    ema.update(net)
    assert ema.module.weight.item() == 1.875
    assert not ema.train().module.training and not ema.module.weight.requires_grad
    assert not ema(torch.ones(2, 1).requires_grad_()).requires_grad


def test_ema_warms_up():
    ema = Ema(nn.Linear(1, 1), decay=0.3)
    decays = []
    for _ in range(5):
        decays.append(ema.current_decay())
        ema.update(nn.Linear(1, 1))
    assert decays == pytest.approx([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3])
    with pytest.raises(ValueError, match="tensors of the copy"):
        ema.update(nn.Linear(1, 1, bias=False))
    with pytest.raises(ValueError, match="decay"):
        Ema(nn.Linear(1, 1), 1.0)


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["row", "batch"] = "row"


@dataclass(frozen=True)
class Outer:
    name: str
    blocks: tuple[int, ...] = (1, 2)
    limit: float | None = None
    flag: bool = False
    options: dict = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_configuration_files(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('name = "x"\nblocks = [3]\n[inner]\nrate = 1\n[options]\nanything = [1, 2]\n')
    assert load_config(Outer, path) == Outer("x", (3,), None, False, {"anything": [1, 2]}, Inner(1.0))
    changed = load_config(Outer, path, ["inner.kind=batch", "limit=0.5", "blocks=[4, 5]", "options.more=1"])
    assert changed == Outer("x", (4, 5), 0.5, False, {"anything": [1, 2], "more": 1}, Inner(1.0, "batch"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"\nblock = [1]', "unknown key block; did you mean blocks?"),
        ('name = "x"\n[inner]\nrat = 1', "unknown key inner.rat; did you mean inner.rate?"),
        ('name = "x"\nzzz = 1', "unknown key zzz; known: name, blocks, limit, flag, options, inner"),
        ("flag = true", "name is missing"),
        ('name = "x"\n[inner]\nrate = "fast"', "inner.rate must be of type float, got 'fast'"),
        ('name = "x"\nblocks = [1, 2.5]', r"blocks\[1\] must be of type int, got 2.5"),
        ('name = "x"\nblocks = [true]', r"blocks\[0\] must be of type int, got True"),
        ('name = "x"\n[inner]\nkind = "column"', "inner.kind must be one of 'row', 'batch', got 'column'"),
        ('name = "x"\ninner = 3', "inner must be a table, got 3"),
        ('name = "x"\nflag = 1', "flag must be of type bool, got 1"),
        ('name = "x"\nlimit = inf', "limit must be a finite number, got inf"),
        ('name = "x"\n[inner]\nrate = nan', "inner.rate must be a finite number, got nan"),
        (f'name = "x"\n[inner]\nrate = 1{"0" * 400}', "inner.rate must be a finite number, got inf"),
        ('name = "x"\n[options]\na = [1, { b = nan }]', r"options.a\[1\].b must be a finite number, got nan"),
        ("name = ", "cannot be read as TOML"),
        (None, "cannot be read as TOML"),
    ],
)
def test_mistakes_in_a_configuration_are_named(tmp_path, text, message):
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{path}: {message}"):
        load_config(Outer, path)


def test_what_a_dataclass_refuses_has_its_table_in_front():
    @dataclass(frozen=True)
    class Both:
        train: Recipe

    with pytest.raises(ConfigError, match=r"^train.epochs: must be positive, got 0"):
        parse_config(Both, {"train": {"epochs": 0}})


def test_settings_of_the_command_line_are_checked(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('name = "x"')
    for setting, message in (
        ("rate", "must be key=value"),
        ("name.x=1", "name is a value"),
        ("nme=1", "unknown key nme"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(Outer, path, [setting])


def test_csv_goes_on_after_a_crash(tmp_path):
    path = tmp_path / "a.csv"
    log = CsvLog(path)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 3, "lr": 1})
    with open(path, "a") as file:
        file.write("4,0.33")  # killed in the middle of a line
    CsvLog(path, 2).write(3, {"loss": 0.5, "lr": 2})
    assert path.read_text() == f"step,loss,lr\n1,{1 / 3!r},1\n2,{2 / 3!r},1\n3,0.5,2\n"
    with pytest.raises(ValueError, match=r"a\.csv: values must be loss, lr, as in its first row, got loss"):
        CsvLog(path, 3).write(4, {"loss": 1.0})
    CsvLog(path)  # a run from the start
    assert not path.exists()


def test_csv_drops_what_is_no_row_and_sets_aside_what_is_no_log(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_bytes(b"step,loss\n1,0.5\n\0\0\0\n2\n2,0.5,7\n\xff\xfe,1\n3,0.25\n\0\0\0\0")
    CsvLog(path, 3).write(4, {"loss": 1.0})
    assert path.read_text() == "step,loss\n1,0.5\n3,0.25\n4,1.0\n"
    for strange in (b"\0\0\0\0\n\0\n", b"something else\n", b"\xff\xfe"):
        path.write_bytes(strange)
        CsvLog(path, 4).write(5, {"loss": 2.0})
        assert path.read_text() == "step,loss\n5,2.0\n" and (tmp_path / "a.csv.damaged").read_bytes() == strange
        assert f"{path}: is no log of a run; set aside as a.csv.damaged" in capsys.readouterr().out


def test_rows_wait_while_the_disk_is_full(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.csv"
    log, real = CsvLog(path), open
    log.write(1, {"loss": 1})

    class Full:
        def __init__(self, file, mode) -> None:
            self.file = real(file, mode)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("effkern.training.logs.open", Full, raising=False)
    log.write(2, {"loss": 2})
    log.write(3, {"loss": 3})
    assert path.read_text() == "step,loss\n1,1\n" and capsys.readouterr().out.count("cannot be written yet") == 1
    with pytest.raises(OSError, match="No space left"):
        log.flush()
    monkeypatch.undo()
    log.write(4, {"loss": 4})
    assert path.read_text() == "step,loss\n1,1\n2,2\n3,3\n4,4\n"
    log.flush()


def test_tensorboard_is_optional_and_says_so(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install tensorboard.*train.csv and eval.csv"):
        TensorBoardLog(tmp_path)
