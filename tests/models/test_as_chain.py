"""Slimmable networks in one call: the scores of their layers, and only where nobody would notice."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from effkern.models import create_model
from effkern.nn import SlicedConvBNAct, SwitchableBatchNorm2d

NAMES = ("ds_mobilenet", "mobilenet_v1_slimmable")


def deployed(name, fold=True):
    """A network with statistics at all widths, folded."""
    model = create_model(name, num_classes=5)
    for norm in (m for m in model.modules() if isinstance(m, SwitchableBatchNorm2d)):
        norm.momentum = 1.0
    count = 15 if name == "ds_mobilenet" else 4
    with torch.no_grad():
        for width in range(count):
            model(torch.randn(4, 3, 64, 64), width)
    model.eval()
    for layer in (m for m in model.modules() if fold and isinstance(m, SlicedConvBNAct)):
        layer.fold()
    return model, count


@pytest.mark.parametrize("name", NAMES)
def test_the_scores_are_those_of_the_layers(name):
    model, count = deployed(name)
    x = torch.randn(6, 3, 64, 64)
    index = torch.randint(0, count, (6,))
    with torch.no_grad():
        scores, layers = model._as_chain(x, index), model._scores(x, index)
        # Of thirty layers that each round their sums; a gate or a row of a wrong width is off by far more.
        torch.testing.assert_close(scores, layers, rtol=1e-4, atol=1e-4 * float(layers.abs().max()))
        assert torch.equal(model(x, index), scores)
        for n, i in enumerate(index.tolist()):
            assert torch.equal(model(x[n : n + 1], i)[0], scores[n])
        assert torch.equal(model(x, -1), model(x, torch.full((6,), count - 1)))
        assert torch.equal(model(x.contiguous(memory_format=torch.channels_last), index), scores)
    assert float(scores.std()) > 1e-2


def test_without_attention_and_at_one_pixel_the_bits_are_the_layers():
    model, _ = deployed("mobilenet_v1_slimmable")
    x, index = torch.randn(5, 3, 32, 32), torch.tensor([3, 0, 1, 0, 2])
    with torch.no_grad():
        assert torch.equal(model._as_chain(x, index), model._scores(x, index))


@pytest.mark.parametrize("name", NAMES)
def test_it_steps_aside(name):
    model, _ = deployed(name, fold=False)
    x, index = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with torch.no_grad():
        assert model._as_chain(x, index) is None  # nothing is folded
    model, _ = deployed(name)
    assert model._as_chain(x, index) is None  # gradients are recorded
    with torch.no_grad():
        assert model._as_chain(x, index) is not None
        assert model._as_chain(x.double(), index) is None
        assert model._as_chain(x[0], index) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert model._as_chain(x, index) is None
        seen = []
        hook = model.classifier.register_forward_hook(lambda *_: seen.append(1))
        model(x, index)
        hook.remove()
        assert seen
        model.dropout.train()
        assert model._as_chain(x, index) is None
    with pytest.raises((IndexError, ValueError)), torch.no_grad():
        model(x, 99)
    with pytest.raises((IndexError, ValueError)), torch.no_grad():
        model(x, torch.tensor([0, 99]))


@pytest.mark.parametrize("name", NAMES)
def test_replaced_and_copied_layers_are_the_ones_that_run(name):
    model, _ = deployed(name)
    x, index = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with torch.no_grad():
        first = model(x, index)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x, index), first)
            twin.classifier.weight.zero_()
            assert torch.equal(twin(x, index), twin.classifier.bias.expand(2, -1))
            assert torch.equal(model(x, index), first)
        model.classifier = copy.deepcopy(model.classifier)
        model.classifier.bias.add_(1)
        torch.testing.assert_close(model(x, index), first + 1)
