"""The rep_conv stage of the demo, in small: it trains, folds, agrees with itself and reports it."""

import json

import pytest
import torch

from effkern.data import load_digits
from effkern.demo import rep_conv as stage
from effkern.demo.context import DemoContext
from effkern.models import create_model


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # maps of a few pixels: a second thread only waits
    context = DemoContext(load_digits(), tmp_path_factory.mktemp("demo"), quick=True, measure_s=0.01)
    yield context, stage.run(context)
    torch.set_num_threads(threads)


def stage_model(context, made):
    model = stage.build(context)
    model.load_state_dict(made.state["train"])
    return model.eval()


def test_rows_are_before_and_after(result):
    context, made = result
    trained, folded = made.rows
    assert (trained.name, folded.name) == (stage.TRAINED, stage.FOLDED)
    assert folded.top1 == trained.top1 == context.accuracy(stage_model(context, made))
    assert folded.params < trained.params and folded.bytes_on_disk < trained.bytes_on_disk
    assert folded.macs < trained.macs and folded.macs_left == folded.macs / trained.macs
    assert folded.relative_to == trained.name and folded.disagreeing == 0
    json.dumps(made.plain())


def test_every_prediction_is_the_same_and_counted(result):
    context, made = result
    assert made.extra["agreeing"] == made.extra["images"] == len(context.data.test)
    assert f"{made.extra['agreeing']} of {made.extra['images']}" in made.rows[1].note
    assert made.extra["folded_error"] <= max(4 * made.extra["train_form_error"], 1e-5)


def test_states_load_into_both_forms(result):
    context, made = result
    train_form = stage_model(context, made)
    channels, _, _ = context.shape
    deployed = create_model("repvgg_small", in_channels=channels, num_classes=context.classes, width=8, deploy=True)
    deployed.load_state_dict(made.state["deploy"])
    x = next(iter(context.batches("test")))[0]
    with torch.no_grad():
        torch.testing.assert_close(deployed.eval()(x), train_form(x), rtol=1e-4, atol=1e-4)
