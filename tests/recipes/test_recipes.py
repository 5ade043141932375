"""Recipes from the command line: their files, their phases, their resumption, their mistakes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from effkern import cli
from effkern.data import load_digits
from effkern.recipes import config_path, names
from effkern.training import load_config, load_weights

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
    change = ["supernet.held_out=0.2", "gate.seen=0.1", "gate.train.epochs=3", "gate.train.ema=0.5", "gate.budget=0.85"]
    assert cli.main(command("dsnet", tmp_path, *change)) == 0
    phases = json.loads((tmp_path / "result.json").read_text())["phases"]
    assert phases["supernet"]["planned"] == 3  # a fifth of 990 // 64 steps
    assert phases["gate"]["planned"] == 15  # three times 371 // 64
    found = phases["gate"]
    assert found["test"]["macs_left"] == pytest.approx(0.85, rel=0.06)  # of 360 images; found on other 200
    assert set(found["routing"]) >= {"histogram", "oracle", "static_mixture", "top1_at"} and found["budget"] == 0.85
    assert any(name.endswith("attention.offset") for name in load_weights(tmp_path / "gate" / "final.safetensors"))


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
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed and all("attention" in name for name in changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["gate.budget=0.01"], "budget: must be in ["),
        (["gate.sgs=soft"], "gate.sgs must be one of 'balanced', 'logits', 'published', 'none', got 'soft'"),
        (["gate.space=[0, 1]"], "space must have 3 indices, got [0, 1]"),
        (["supernet.held_out=1"], "supernet.held_out: must be in [0, 1), got 1.0"),
        (["network.name=slimmable_cnn", "network.options={widths=[2,4],blocks=[1,1]}"], "SlimmableCNN has no gates"),
    ],
)
def test_mistakes_about_gates_are_one_line(change, message, tmp_path, capsys):
    assert cli.main(command("dsnet", tmp_path, *change)) == 1
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_large_networks_with_a_large_policy_run_the_same_recipe(tmp_path):
    """As imagenet.toml, in small: a bottleneck network, a policy that begins with trained blocks."""
    from effkern.models import create_model
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
