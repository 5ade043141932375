"""Recipes from the command line: their files, their phases, their resumption, their mistakes."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from effkern import cli
from effkern.blockdrop import block_costs
from effkern.data import load_digits
from effkern.dsnet import evaluate_routing, route_costs
from effkern.models import create_model
from effkern.recipes import blockdrop, config_path, names
from effkern.training import CheckpointError, ConfigError, Supervised, load_config, load_weights, parse_config
from effkern.training.config import tomllib

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PHASES = {"blockdrop": ["base", "policy", "joint"], "dsnet": ["supernet", "gate"], "stochastic-depth": ["train"]}
TINY = ["network.options={widths=[4,4,4],blocks=[1,1,1],stem_stride=2,shortcut='pool'}"]
SLIM = ["network.name=ds_resnet", "network.options={stem=4,front=[[8,1,1]],stages=[[[4,6,8],1,2]],space=[0,1,2]}"]
SHORT = {
    "stochastic-depth": ["train.epochs=0.2", "train.batch_size=64"],
    "dsnet": [
        "supernet.train.epochs=0.2",
        "supernet.train.batch_size=64",
        "supernet.calibration=2",
        "supernet.held_out=0",
        "gate.seen=1.0",
        "gate.train.epochs=0.2",
        "gate.train.batch_size=64",
        "gate.budget=0.9",
    ],
    "blockdrop": [
        *(f"{phase}.train.epochs=0.2" for phase in ("base", "policy", "joint")),
        *(f"{phase}.train.batch_size=64" for phase in ("base", "policy", "joint")),
        "policy.widths=[4]",
    ],
}


def command(name: str, out: Path, *more: str) -> list[str]:
    settings = [
        word for setting in [*(TINY if name != "dsnet" else SLIM), *SHORT[name], *more] for word in ("--set", setting)
    ]
    return ["train", name, "--data", "digits", "--out", str(out), *settings]


@pytest.mark.parametrize(("scale", "factor"), [("original", 0.5), ("none", 1.0)])
def test_the_scale_of_the_base_decides_what_the_policy_sees(scale, factor, tmp_path):
    change = [f"base.scale={scale}", "base.survival=0.5", "base.form=uniform", "base.mode=row"]
    assert cli.main(command("blockdrop", tmp_path, *change)) == 0
    base, after = (load_weights(tmp_path / phase / "final.safetensors") for phase in ("base", "policy"))
    norm = "layer1.0.bn2.weight"
    assert torch.equal(after[f"backbone.{norm}"], factor * base[norm])


@pytest.mark.parametrize("name", names())
def test_every_configuration_file_is_one(name):
    folder = config_path(name, "small").parent
    module = importlib.import_module(f"effkern.recipes.{folder.name}")
    files = sorted(path.stem for path in folder.glob("*.toml"))
    assert {"paper", "small"} <= set(files)
    data = load_digits()
    for file in files:
        config = load_config(module.Config, config_path(name, file))
        assert module.phases(config, data, dict)


@pytest.mark.parametrize("name", sorted(SHORT))
def test_a_recipe_runs_and_a_second_start_only_reports(name, tmp_path, capsys):
    for _ in range(2):
        assert cli.main(command(name, tmp_path)) == 0
    said = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "result.json").read_text())
    phases = PHASES[name]
    assert list(result["phases"]) == phases and len(said) == 2 * len(phases) and said[0] == said[len(phases)]
    for phase in phases:
        done = result["phases"][phase]
        assert done["steps"] == done["planned"] == 4 and 0 <= done["test"]["top1"] <= 100
        assert load_weights(tmp_path / phase / "final.safetensors")
    assert cli.main([*command(name, tmp_path), "--fresh"]) == 0


def test_a_later_phase_may_change_without_the_earlier_ones(tmp_path, capsys):
    assert cli.main(command("blockdrop", tmp_path)) == 0
    assert cli.main(command("blockdrop", tmp_path, "joint.gamma=2")) == 1
    assert (
        "joint/checkpoints: holds a run of another configuration (joint.gamma: 5.0, now 2.0)" in capsys.readouterr().err
    )
    other = tmp_path / "other"
    other.mkdir()
    for phase in ("base", "policy"):
        (tmp_path / phase).rename(other / phase)
    assert cli.main(command("blockdrop", other, "joint.gamma=2")) == 0


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (["train.lrr=1"], 1, "unknown key train.lrr; did you mean train.lr?"),
        (["train.epochs=0"], 1, "train.epochs: must be positive, got 0"),
        (["depth.mode=column"], 1, "depth.mode must be one of 'batch', 'row', 'subset', got 'column'"),
        (["network.name=resnet33"], 1, "unknown name 'resnet33'"),
        (["network.name=mobilenet_v2", "network.options={}"], 1, "there is no residual block"),
        (["network.init=/nowhere.safetensors"], 1, "train: /nowhere.safetensors: cannot be read"),
        (["train.batch_size=5000"], 1, "batch_size: must be in [1, 1237]"),
        (["train.epochs=inf"], 1, "train.epochs must be a finite number, got inf"),
        (["run.evaluate_every=nan"], 1, "run.evaluate_every must be a finite number, got nan"),
        (["network.options={widths=[4, nan]}"], 1, "network.options.widths[1] must be a finite number, got nan"),
        (["train.label_smoothing=-1"], 1, "train.label_smoothing: must be in [0, 1], got -1"),
        (["train.budget_s=0"], 1, "train.budget_s: must be positive, got 0"),
        (["run.save_every_s=-1"], 1, "save_every_s: must be at least 0, got -1"),
        (["data.shift=-1"], 1, "data.shift: must be at least 0, got -1"),
        (["network.options={in_channels=3}"], 1, "network.options: in_channels must be left out, as the data say it"),
        (["network.options={widths='abc'}"], 1, "network.options: no resnet32 has widths='abc': "),
        (["network.options={stem_stride=0}"], 1, "stem_stride must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(change, status, message, tmp_path, capsys):
    assert cli.main(command("stochastic-depth", tmp_path, *change)) == status
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_stochastic_depth_leaves_a_plain_network_too(tmp_path, capsys):
    """The scale of inference is part of its weights; a checkpoint knows which scale it was trained with."""
    assert cli.main(command("stochastic-depth", tmp_path)) == 0
    final, plain = (load_weights(tmp_path / "train" / f"{name}.safetensors") for name in ("final", "deployed"))
    scaled = {f"layer{i + 1}.0.bn2.{part}": p for i, p in enumerate((0.9, 0.8, 0.7)) for part in ("weight", "bias")}
    assert final.keys() == plain.keys()
    for name, tensor in final.items():
        torch.testing.assert_close(plain[name], tensor * scaled[name] if name in scaled else tensor)
    assert cli.main(command("stochastic-depth", tmp_path, "depth.scale=inverted")) == 1
    assert "another configuration (depth.scale: 'original', now 'inverted')" in capsys.readouterr().err


def test_weights_of_another_network_are_one_line(tmp_path, capsys):
    assert cli.main(command("stochastic-depth", tmp_path)) == 0
    weights = tmp_path / "train" / "final.safetensors"
    other = "network.options={widths=[4,4,4],blocks=[1,9,1],stem_stride=2,shortcut='pool'}"
    capsys.readouterr()
    assert cli.main(command("stochastic-depth", tmp_path / "other", other, f"network.init={weights}")) == 1
    said = capsys.readouterr().err
    assert f"{weights}: does not fit resnet32: " in said and "layer2.1.conv1.weight" in said
    assert len(said.splitlines()) == 1 and len(said) < 800


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "pickle", "objects", "encrypted"])
def test_a_damaged_archive_of_weights_is_one_line_and_runs_nothing(damage, tmp_path, capsys):
    class Run:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = tmp_path / "weights.npz"
    np.savez_compressed(path, **{"conv1.weight": np.linspace(0, 1, 999)})
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[content.index(b".npy") + 40] ^= 0xFF  # of the compressed stream
    elif damage == "encrypted":
        content[content.index(b"PK\x01\x02") + 8] |= 1
    elif damage == "objects":
        np.savez(path, **{"conv1.weight": np.array([Run()], dtype=object)})
        content = bytearray(path.read_bytes())
    changed = {"empty": b"", "cut": content[: len(content) // 2], "pickle": pickle.dumps(Run())}
    path.write_bytes(changed.get(damage, content))
    assert cli.main(command("stochastic-depth", tmp_path / "run", f"network.init={path}")) == 1
    said = capsys.readouterr().err
    assert f"{path}: cannot be read as weights: " in said and len(said.splitlines()) == 1
    assert not (tmp_path / "executed").exists()


def test_every_option_of_a_file_reaches_its_method():
    """Everything another value than by default, so that two that are mixed up show."""
    module, data = importlib.import_module("effkern.recipes.blockdrop"), load_digits()
    text = """
        [network]
        name = "resnet20"
        options = { widths = [4, 4, 4], blocks = [1, 1, 1], stem_stride = 2, shortcut = "pool" }
        [policy]
        widths = [3, 5]
        stem_stride = 3
        pool = 2
        init = 1.5
        gamma = 2.5
        a = 0.7
        beta = 0.3
        entropy_form = "published"
        samples = 4
        blocks_per_epoch = 0.25
        ramp = 0.75
        cost = "macs"
        overhead = true
        train = { epochs = 1 }
        [joint]
        gamma = 6.5
        a = 0.9
        pg_weight = 3.5
        bn_stats = "frozen"
        policy_lr = 0.5
        cost = "macs"
        train = { epochs = 1 }
        [run]
        cache_gb = 0.5
    """
    config = parse_config(module.Config, tomllib.loads(text))
    made = []
    for phase in module.phases(config, data, lambda name: made[0].result().state_dict()):
        made.append(phase.build())
    first, second = made
    policy = first.net.policy
    assert [b.out_channels for b in policy.blocks] == [3, 5] and policy.conv1.stride == (3, 3) and policy.pool == 2
    assert policy.linear.bias.tolist() == [1.5] * 3
    a, b = first.gradient, second.objective
    assert (a.gamma, a.a, a.beta, a.entropy_form, a.samples) == (2.5, 0.7, 0.3, "published", 4)
    assert (first.blocks_per_epoch, first.ramp, a.cache.limit) == (0.25, 0.75, 0.5e9)
    each, rest = block_costs(first.net, data.image_shape)
    assert torch.equal(first.cost, each) and float(first.overhead) == rest
    assert (b.gamma, b.a, b.pg_weight, b.bn_stats, second.policy_lr) == (6.5, 0.9, 3.5, "frozen", 0.5)
    assert torch.equal(second.cost, each) and float(second.overhead) == 0

    module = importlib.import_module("effkern.recipes.dsnet")
    text = """
        [network]
        name = "ds_resnet"
        options = { stem = 4, front = [[8, 1, 1]], stages = [[[4, 6, 8, 10], 1, 2]], space = [0, 1, 2] }
        [supernet]
        random = 1
        target = "distillation"
        ensemble = false
        train = { epochs = 1, label_smoothing = 0.3 }
        [gate]
        space = [0, 1, 3]
        sgs = "logits"
        targets = "cheapest"
        hopeless = "slimmest"
        task = 0.25
        sgs_weight = 0.75
        cost = "hinge"
        cost_weight = 1.5
        budget = 0.9
        tau = 0.5
        gate_smoothing = 0.125
        heads = "slim"
        train = { epochs = 1, label_smoothing = 0.2 }
        [run]
        cache_gb = 0.5
    """
    config, made = parse_config(module.Config, tomllib.loads(text)), []
    for phase in module.phases(config, data, lambda name: made[0].result().state_dict()):
        made.append(phase.build())
    supernet, gate = made
    assert (supernet.random, supernet.target, supernet.ensemble) == (1, "distillation", False)
    assert supernet.label_smoothing == 0.3 and supernet.teacher is None
    assert all(p.requires_grad for p in supernet.parameters())
    assert [one.space for one in gate.gates] == [(0, 1, 3)]
    assert (gate.sgs, gate.targets, gate.hopeless) == ("logits", "cheapest", "slimmest")
    assert (gate.task, gate.sgs_weight, gate.cost, gate.cost_weight) == (0.25, 0.75, "hinge", 1.5)
    assert (gate.budget, gate.tau, gate.label_smoothing, gate.cache.limit) == (0.9, 0.5, 0.2, 0.5e9)
    assert [loss.smoothing for loss in gate.sgs_losses] == [0.125]
    assert not gate.gates[0].expand.weight.requires_grad and gate.gates[0].slim.weight.requires_grad


@pytest.mark.parametrize("name", ["blockdrop", "stochastic-depth"])
def test_every_option_of_survival_reaches_its_blocks(name):
    module = importlib.import_module(f"effkern.recipes.{name.replace('-', '_')}")
    network = {"name": "resnet20", "options": {"widths": [4, 4, 4], "blocks": [1, 1, 1]}}
    how = {"form": "uniform", "mode": "row", "scale": "none"}
    plain = {"epochs": 1, "label_smoothing": 0.3}
    if name == "blockdrop":
        rest = {"policy": {"train": plain}, "joint": {"train": plain}}
        values = {"network": network, "base": {**how, "survival": 0.75, "train": plain}, **rest}
    else:
        values = {"network": network, "depth": {**how, "last": 0.75}, "train": plain}
    method = module.phases(parse_config(module.Config, values), load_digits(), dict)[0].build()
    assert [block.survival for block in method.blocks] == [0.75] * 3 and method.criterion.label_smoothing == 0.3
    assert all((block.mode, block.scale) == ("row", "none") for block in method.blocks)
    if name == "blockdrop":
        values["base"] = {"train": plain}  # every block survives
        method = module.phases(parse_config(module.Config, values), load_digits(), dict)[0].build()
        assert isinstance(method, Supervised) and method.criterion.label_smoothing == 0.3


def test_a_teacher_teaches_base_and_joint_phase_alone(tmp_path):
    assert cli.main(command("stochastic-depth", tmp_path / "dense")) == 0
    file = tmp_path / "dense" / "train" / "deployed.safetensors"
    given = ["teacher.weight=0.3", "teacher.temperature=2.0", "joint.beta=0.01", f"teacher.init={file}"]
    assert cli.main(command("blockdrop", tmp_path / "taught", *given)) == 0
    assert not any("teacher" in name for name in load_weights(tmp_path / "taught" / "base" / "final.safetensors"))
    settings = [*TINY, *SHORT["blockdrop"], *given]
    config = load_config(blockdrop.Config, config_path("blockdrop", "small"), settings)
    outcomes = {name: load_weights(tmp_path / "taught" / name / "final.safetensors") for name in ("base", "policy")}
    base, _, joint = blockdrop.phases(config, load_digits(), outcomes.__getitem__)
    for judge in (base.build().criterion, (objective := joint.build().objective).criterion):
        assert (judge.weight, judge.temperature) == (0.3, 2.0)
        weights = judge.teacher.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in load_weights(file).items())
    assert objective.beta == 0.01
    other = ["teacher.name=resnet20", "teacher.options={widths=[8,8,8],blocks=[1,1,1]}"]
    config = load_config(blockdrop.Config, config_path("blockdrop", "small"), [*settings, *other])
    with pytest.raises(CheckpointError, match="does not fit resnet20"):
        blockdrop.phases(config, load_digits(), dict)[0].build()


def test_a_joint_phase_goes_on_from_an_earlier_one(tmp_path):
    assert cli.main(command("blockdrop", tmp_path / "first")) == 0
    end = tmp_path / "first" / "joint" / "final.safetensors"
    settings = [*TINY, *SHORT["blockdrop"], f"joint.init={end}", "joint.gamma=1"]
    config = load_config(blockdrop.Config, config_path("blockdrop", "small"), settings)
    (phase,) = blockdrop.phases(config, load_digits(), {}.__getitem__)
    method, weights = phase.build(), load_weights(end)
    assert method.gamma == 1 and method.net.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in method.net.state_dict().items())
    assert cli.main(command("blockdrop", tmp_path / "second", f"joint.init={end}")) == 0
    result = json.loads((tmp_path / "second" / "result.json").read_text())
    assert list(result["phases"]) == ["joint"]
    config = load_config(blockdrop.Config, config_path("blockdrop", "small"), [*settings, "policy.widths=[8]"])
    with pytest.raises(CheckpointError, match="does not fit resnet32 and its policy"):
        blockdrop.phases(config, load_digits(), {}.__getitem__)[0].build()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("teacher.init=", "teacher.init: must be a file of weights"),
        ("teacher.weight=2", "teacher.weight: must be in [0, 1], got 2"),
        ("teacher.temperature=0", "teacher.temperature: must be positive"),
        ("teacher.options={widths=[4,4,4]}", "teacher.options: must be left out without a name"),
    ],
)
def test_a_wrong_teacher_is_named(setting, message):
    with pytest.raises(ConfigError) as raised:
        load_config(blockdrop.Config, config_path("blockdrop", "small"), ["teacher.init=file", setting])
    assert message in str(raised.value)


def test_statistics_of_every_way_are_calibrated(tmp_path):
    options = (
        "network.options={stem=4,front=[[4,1,1]],stages=[[[4,6],1,2],[[4,6],1,2]],gated=[0,1],space=[0,1],"
        "statistics='way'}"
    )
    assert cli.main(command("dsnet", tmp_path, options)) == 0
    weights = load_weights(tmp_path / "supernet" / "final.safetensors")
    counts = {len(t): t.tolist() for name, t in weights.items() if name.endswith("num_batches_tracked")}
    # Behind the second gate a way each; those of one width throughout are gone twice, as a width and as a way.
    assert set(counts) == {2, 4} and counts[4] == [4, 2, 2, 4]


@pytest.mark.parametrize("name", ["slimmable_cnn", "mobilenet_v1_slimmable"])
def test_slimmable_networks_without_gates_are_supernets_too(name, tmp_path):
    config = tmp_path / "c.toml"
    options = "widths = [2, 4], blocks = [1, 1]" if name == "slimmable_cnn" else "width_mults = [0.25, 0.3]"
    config.write_text(
        f"[network]\nname = '{name}'\noptions = {{ {options} }}\n"
        "[supernet]\ncalibration = 1\ntrain = { epochs = 0.1, batch_size = 64 }\n"
    )
    assert cli.main(["train", "dsnet", "--data", "digits", "--config", str(config), "--out", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "result.json").read_text())["phases"]) == ["supernet"]


def test_best_weights_that_are_gone_are_said(tmp_path, capsys):
    assert cli.main(command("blockdrop", tmp_path)) == 0
    (tmp_path / "joint" / "best.safetensors").unlink()
    capsys.readouterr()
    assert cli.main(command("blockdrop", tmp_path)) == 0
    assert f"{tmp_path}/joint/best.safetensors: is missing; the last state is the outcome" in capsys.readouterr().out


def test_rewards_may_count_work_or_time(tmp_path, capsys):
    change = ["policy.cost=time", "joint.cost=macs", "joint.overhead=true", "run.norms=true", "run.log_every=1"]
    assert cli.main(command("blockdrop", tmp_path, *change)) == 0
    lines = (tmp_path / "joint" / "train.csv").read_text().splitlines()
    assert {"grad_norm", "weight_change"} <= set(lines[0].split(",")) and len(lines) == 5
    assert cli.main(command("blockdrop", tmp_path / "other", "policy.overhead=true")) == 1
    assert "policy.overhead: needs policy.cost = 'macs' or 'time'" in capsys.readouterr().err


def test_passes_without_gradient_may_run_plain_pytorch(tmp_path, capsys):
    """The same training but for rounding; a run may go on the other way, so nothing is trained anew."""
    plain = "run.skip_ops=false"
    assert cli.main(command("blockdrop", tmp_path / "ops")) == 0
    assert cli.main(command("blockdrop", tmp_path / "plain", plain)) == 0
    first, second = (load_weights(tmp_path / name / "joint" / "final.safetensors") for name in ("ops", "plain"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)
    before = (tmp_path / "ops" / "joint" / "train.csv").read_text()
    assert cli.main(command("blockdrop", tmp_path / "ops", plain)) == 0
    assert (tmp_path / "ops" / "joint" / "train.csv").read_text() == before


def test_what_is_not_there_is_listed(tmp_path, capsys):
    for arguments, message in (
        (["train", "blockdorp", "--data", "digits"], "'blockdorp': must be one of blockdrop"),
        (
            ["train", "blockdrop", "--data", "digits", "--config", "x"],
            "config: must be one of imagenet, paper, published, small or",
        ),
        (
            ["train", "blockdrop", "--data", "mnist"],
            "data: must be fashion-mnist, digits, cifar10:PATH or imagefolder:PATH, got 'mnist'",
        ),
    ):
        assert cli.main([*arguments, "--out", str(tmp_path)]) in (1, 2)
        assert message in capsys.readouterr().err


def test_a_network_the_method_cannot_use_is_refused(tmp_path, capsys):
    change = ["network.name=mobilenet_v2", "network.options={}", "base.survival=1"]
    assert cli.main(command("blockdrop", tmp_path, *change)) == 1
    said = capsys.readouterr()
    assert "MobileNetV2 has no skippable blocks" in said.err and said.out == ""  # before anything is trained
    for wrong, message in (
        ("policy.a=0.5", "policy.a: must be in (0.5, 1], got 0.5"),
        ("policy.widths=[]", "widths, stem_stride and pool must be at least 1, got [], 2 and 1"),
        ("policy.pool=29", "policy.pool: must be at most 28, the size of the images, got 29"),
        ("policy.weights=/nowhere", "/nowhere: cannot be read"),
        ("joint.train.batch_size=5000", "batch_size: must be in [1, 1237]"),
        ("joint.gamma=-1", "joint.gamma: must be at least 0, got -1"),
        ("base.survival=2", "base.survival: must be in [0, 1], got 2"),
    ):
        assert cli.main(command("blockdrop", tmp_path, wrong)) == 1
        said = capsys.readouterr()
        assert message in said.err and said.out == "" and not (tmp_path / "base").exists()
    assert cli.main(command("dsnet", tmp_path, *change[:2])) == 1
    assert "MobileNetV2 is not slimmable" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    arguments = command("stochastic-depth", tmp_path, "train.epochs=50", "run.save_every_s=0")
    process = subprocess.Popen(
        [sys.executable, "-m", "effkern", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("train/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in err and "Traceback" not in err


@pytest.mark.slow
def test_torchrun_runs_the_same_command(tmp_path):
    """Both ranks train and one writes; that they train like one process is tested with the loop."""
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "effkern", *command("blockdrop", tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "result.json").read_text())["phases"]["joint"]["steps"] == 4
    assert done.stdout.count("joint: ") == 1


def test_gates_learn_on_images_held_out_and_meet_their_budget(tmp_path):
    wide = "network.options={stem=4,front=[[8,1,1]],stages=[[[8,12,16],1,2]],space=[0,1,2]}"
    change = ["supernet.held_out=0.2", "gate.seen=0.1", "gate.train.epochs=3", "gate.train.ema=0.5", "gate.budget=0.85"]
    change.append(wide)
    assert cli.main(command("dsnet", tmp_path, *change)) == 0
    phases = json.loads((tmp_path / "result.json").read_text())["phases"]
    assert phases["supernet"]["planned"] == 3  # a fifth of 990 // 64 steps
    assert phases["gate"]["planned"] == 15  # three times 371 // 64
    found = phases["gate"]
    assert found["test"]["macs_left"] == pytest.approx(0.85, rel=0.06)  # of 360 images; found on other 200
    assert set(found["routing"]) >= {"histogram", "oracle", "static_mixture", "top1_at"} and found["budget"] == 0.85
    weights = load_weights(tmp_path / "gate" / "final.safetensors")
    net = create_model("ds_resnet", in_channels=1, num_classes=10, **tomllib.loads(wide)["network"]["options"]).eval()
    net.load_state_dict(weights)
    data, costs = load_digits(), route_costs(net, (1, 28, 28))
    found = evaluate_routing(net, data.batches(data.val, 250), costs)
    assert found.macs_left == pytest.approx(0.85, rel=0.01) and found.diversity > 0.1


def test_gates_go_on_from_a_supernets_file(tmp_path):
    """As another run, with a routing space of its own."""
    assert cli.main(command("dsnet", tmp_path / "first")) == 0
    weights = tmp_path / "first" / "supernet" / "final.safetensors"
    config = tmp_path / "gate.toml"
    config.write_text(
        "[network]\nname = 'ds_resnet'\n[gate]\nsgs = 'logits'\ntrain = { epochs = 0.2, batch_size = 64 }\n"
    )
    options = "network.options={stem=4,front=[[8,1,1]],stages=[[[4,6,8],1,2]],space=[0,1,2]}"
    arguments = ["train", "dsnet", "--data", "digits", "--config", str(config), "--out", str(tmp_path / "second")]
    settings = ["--set", options, "--set", f"network.init={weights}"]
    assert cli.main([*arguments, *settings]) == 0
    result = json.loads((tmp_path / "second" / "result.json").read_text())
    assert list(result["phases"]) == ["gate"]
    before, after = load_weights(weights), load_weights(tmp_path / "second" / "gate" / "final.safetensors")
    counts = [tensor for name, tensor in before.items() if name.endswith("num_batches_tracked")]
    assert counts and all(bool((count == 2).all()) for count in counts)  # calibrated when its training was over
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed and all("attention" in name for name in changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["gate.budget=0.01"], "budget: must be in ["),
        (
            ["gate.sgs=soft"],
            "gate.sgs must be one of 'balanced', 'logits', 'published', 'expected', 'none', got 'soft'",
        ),
        (["gate.space=[0, 1]"], "space must have 3 indices, got [0, 1]"),
        (["supernet.held_out=1"], "supernet.held_out: must be in [0, 1), got 1.0"),
        (["gate.space=[0, 1, 3]"], "gate.space: must be width indices of at most 2, got [0, 1, 3]"),
        (["gate.seen=0"], "batch_size: must be in [1, 0], the number of images, got 64"),
        (["gate.seen=2"], "gate.seen: must be in [0, 1], got 2.0"),
        (["gate.gate_smoothing=-1"], "gate.gate_smoothing: must be in [0, 1], got -1.0"),
        (["supernet.calibration=0"], "supernet.calibration: must be at least 1, got 0"),
        (["network.name=slimmable_cnn", "network.options={widths=[2,4],blocks=[1,1]}"], "SlimmableCNN has no gates"),
    ],
)
def test_mistakes_about_gates_are_one_line(change, message, tmp_path, capsys):
    assert cli.main(command("dsnet", tmp_path, *change)) == 1
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "supernet").exists()  # and not when the supernet is trained


def test_large_networks_with_a_large_policy_run_the_same_recipe(tmp_path):
    """As imagenet.toml, in small: a bottleneck network, a policy that begins with trained blocks."""
    from effkern.training import save_weights

    first = create_model("resnet18", in_channels=1, widths=[4, 4, 8, 8], blocks=[1, 1, 1, 1])
    save_weights(tmp_path / "first.safetensors", first.state_dict())
    change = [
        "network.name=resnet50",
        "network.options={widths=[2, 2, 4, 4], blocks=[1, 1, 1, 1]}",
        "policy.widths=[4, 4, 8, 8]",
        "policy.large=true",
        f"policy.weights={tmp_path / 'first.safetensors'}",
    ]
    settings = [word for setting in [*SHORT["blockdrop"], *change] for word in ("--set", setting)]
    arguments = ["train", "blockdrop", "--data", "digits", "--out", str(tmp_path / "run"), *settings]
    assert cli.main([*arguments, "--set", "base.survival=1"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["phases"]["joint"]["steps"] == 4
