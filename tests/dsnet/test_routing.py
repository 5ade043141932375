"""Networks with gates: dynamic batches are their images, costs are those of the ways, budgets are met."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from effkern.dsnet import (
    Dynamic,
    Routing,
    all_ways,
    calibrate,
    evaluate_routing,
    expected_cost,
    mac_table,
    meet_budget,
    uncalibrated,
)
from effkern.dsnet.gating import _weights
from effkern.dsnet.route import finish, route_costs, uniform_routes
from effkern.models import create_model
from tests.dsnet.gated import CASES, DATA, IMAGE, ONE, TWO, WAYS, batch, network


def at(net, x, widths):
    return finish(net, net.gates[0](net.segment(0, x, 0), 0), widths)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_dynamic_batch_is_each_image_alone_in_any_order(name, options):
    net, (x, _) = network(name, options), batch()
    with torch.no_grad():
        scores, choice = net.route(x)
        assert len(choice.unique(dim=0)) > 1, "the gates do not differ: the test says nothing"
        order = torch.randperm(len(x))
        again, other = net.route(x[order])
        torch.testing.assert_close(again, scores[order], rtol=1e-5, atol=1e-5)
        assert torch.equal(other, choice[order])
        for n in range(len(x)):
            widths = [gate.space[i] for gate, i in zip(net.gates, choice[n].tolist(), strict=True)]
            torch.testing.assert_close(scores[n : n + 1], at(net, x[n : n + 1], widths), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_weights_of_widths_give_what_slices_give(name, options):
    """What gates are trained on is what runs, the mixed batch included."""
    net, (x, _) = network(name, options), batch()
    with torch.no_grad():
        scores, choice = net.route(x)
        y, before = net.segment(0, x, 0), 0
        for k, gate in enumerate(net.gates):
            y, _ = gate.decide(y, before)
            width = _weights(F.one_hot(choice[:, k], len(gate.space)).float(), gate.space)
            at = net.configuration(k + 1, width, before)
            y, before = net.segment(k + 1, y, at, before), at
    torch.testing.assert_close(y, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(ONE))
def test_a_gate_that_always_says_i_is_uniform_i(name):
    """All fronts of one width are the same, so a dynamic network needs no statistics of its own."""
    net, (x, _) = network(name), batch()
    (gate,) = net.gates
    with torch.no_grad():
        for position, index in enumerate(gate.space):
            gate.offset.zero_()[position] = 1e6
            torch.testing.assert_close(net.dynamic(x), net(x, index), rtol=1e-4, atol=1e-4)


def test_inference_is_deterministic_and_leaves_nothing_behind():
    net, (x, _) = network("ds_mobilenet"), batch()
    other = copy.deepcopy(net)
    with torch.no_grad():
        first = net.dynamic(x)
        torch.manual_seed(1)
        for width in (0, 3, torch.zeros(len(x), dtype=torch.int64)):
            assert torch.equal(net(x, width), net(x, width))
        assert torch.equal(net.dynamic(x), first) and torch.equal(Dynamic(net)(x), first)
        assert torch.equal(other.dynamic(x), first)
        fresh = network("ds_mobilenet", calibrated=False).eval()
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(fresh.dynamic(x), first)


def test_a_network_without_gates_is_refused():
    with pytest.raises(ValueError, match="SlimmableCNN has no gates"):
        Dynamic(create_model("slimmable_cnn"))


@pytest.mark.parametrize("name", list(ONE))
def test_costs_are_those_of_the_widths_and_the_gate(name):
    net = network(name)
    (gate,) = net.gates
    costs = route_costs(net, IMAGE)
    assert costs.dtype == torch.int64
    assert (costs - mac_table(net, IMAGE, 3)).tolist() == [gate.hidden * len(gate.space)] * 3


def test_costs_of_two_gates_depend_on_both():
    net = network(*CASES[3])
    costs = route_costs(net, IMAGE)
    assert costs.shape == (2, 3)
    assert costs[0, 1] - costs[0, 0] != costs[1, 1] - costs[1, 0]
    choice = torch.tensor([[0, 2], [1, 1], [1, 0]])
    rows = [F.one_hot(choice[:, k], n).float().requires_grad_() for k, n in enumerate((2, 3))]
    spent = expected_cost(costs, rows)
    assert spent.dtype == torch.float64 and spent.tolist() == costs[tuple(choice.T)].tolist()
    spent.sum().backward()
    assert rows[0].grad.tolist() == costs[:, choice[:, 1]].T.tolist()
    assert rows[1].grad.tolist() == costs[choice[:, 0]].tolist()
    assert uniform_routes(net) == [(0, 0), (0, 1), (1, 2)]


def test_the_expected_cost_by_enumeration_and_differences():
    """The mean over all ways, each as likely as the product of its choices."""
    table = torch.tensor([[10, 20, 40], [30, 70, 110]])
    weights = [torch.rand(4, count, dtype=torch.float64).softmax(1).requires_grad_() for count in (2, 3)]
    want = sum(weights[0][:, i] * weights[1][:, j] * table[i, j] for i in range(2) for j in range(3))
    torch.testing.assert_close(expected_cost(table, weights), want)
    assert torch.autograd.gradcheck(lambda *w: expected_cost(table, w), weights)


def test_dsnets_costs_are_the_published_ones_with_the_gate():
    net = create_model("ds_mobilenet")
    assert (route_costs(net, (3, 64, 64)) - mac_table(net, (3, 64, 64), 4)).tolist() == [264] * 4


def test_routing_by_hand():
    correct_at = torch.tensor([[1, 1], [1, 1], [0, 1], [0, 0]]).bool()
    found = Routing(
        choice=torch.tensor([[0], [1], [1], [1]]),
        correct=torch.tensor([1, 1, 1, 0]).bool(),
        correct_at=correct_at,
        macs=torch.tensor([10, 30, 30, 30]),
        macs_at=torch.tensor([10, 30]),
        spaces=[2],
    )
    assert found.top1 == 75 and found.top1_at == [50, 75] and found.oracle == 75
    assert found.mean_macs == 25 and found.macs_left == pytest.approx(25 / 30)
    assert found.diversity == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert found.same_histogram == pytest.approx(0.25 * 50 + 0.75 * 75)
    assert found.static_mixture == pytest.approx(0.25 * 50 + 0.75 * 75)
    assert found.wide_given_hard == 1 and found.wide_given_easy == 0.5
    assert found.plain()["histogram"] == [[0.25, 0.75]]


def test_a_mixture_takes_the_best_two_widths():
    """At 20 of 10, 20 and 30, half of the first and half of the last beat the one between."""
    found = Routing(
        choice=torch.tensor([[1]] * 4),
        correct=torch.ones(4).bool(),
        correct_at=torch.tensor([[1, 0, 1], [1, 0, 1], [0, 1, 1], [0, 0, 1]]).bool(),
        macs=torch.tensor([20] * 4),
        macs_at=torch.tensor([10, 20, 30]),
        spaces=[3],
    )
    assert found.static_mixture == 75 and found.same_histogram == 25 and found.diversity == 0


def test_routing_of_two_gates_by_hand():
    found = Routing(
        choice=torch.tensor([[0, 2], [1, 2], [0, 0], [1, 1]]),
        correct=torch.ones(4).bool(),
        correct_at=torch.tensor([[1, 1], [0, 1], [0, 1], [0, 1]]).bool(),
        macs=torch.tensor([10, 30, 30, 30]),
        macs_at=torch.tensor([10, 30]),
        spaces=[2, 3],
    )
    assert found.histogram == [[0.5, 0.5], [0.25, 0.25, 0.5]]
    assert found.diversity == pytest.approx((math.log(2) + 1.5 * math.log(2)) / 2)
    assert found.wide_given_hard == pytest.approx(1 / 3) and found.wide_given_easy == 1  # of the last gate
    assert found.same_histogram is None


@pytest.mark.parametrize(("name", "options"), CASES)
def test_evaluation_counts_what_ran(name, options):
    net = network(name, options).train()
    x, y = batch()
    costs = route_costs(net, IMAGE)
    found = evaluate_routing(net, [(x[:10], y[:10]), (x[10:], y[10:])], costs)
    assert net.training
    net.eval()
    with torch.no_grad():
        scores, choice = net.route(x)
    assert torch.equal(found.choice, choice) and torch.equal(found.correct, scores.argmax(1) == y)
    assert torch.equal(found.macs, costs[tuple(choice.T)])
    with pytest.raises(ValueError, match="at least one image"):
        evaluate_routing(net, [], costs)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_budget_is_met(name, options):
    net = network(name, options)
    images = [DATA.normalize(part) for part in DATA.val.images[:256].split(128)]
    costs = route_costs(net, IMAGE)
    low, high = float(costs.min()), float(costs.max())
    for share in (0.3, 0.5, 0.8):
        budget = low + share * (high - low)
        spent = meet_budget(net, images, budget, costs)
        with torch.no_grad():
            choice = torch.cat([net.route(x)[1] for x in images])
        assert costs[tuple(choice.T)].double().mean().item() == pytest.approx(spent)
        assert spent == pytest.approx(budget, rel=0.03)
    with pytest.raises(ValueError, match=r"budget: must be in \["):
        meet_budget(net, images, high * 1.01, costs)


def test_calibration_reaches_every_statistic():
    net = network("ds_mobilenet", calibrated=False)
    with pytest.raises(RuntimeError, match=r"stem\.bn\[3\]"):
        calibrate(net, [batch()[0]], range(3))  # `largest` is a configuration too


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_every_way_has_its_own_statistics(name, options):
    """What batch norm behind the second gate has for a way is the mean of what it sees there, and no other way's."""
    net, (x, _) = network(name, options), batch(64)
    layer = net.blocks[net._gated[1]]
    layer = layer.pointwise if name == "ds_mobilenet" else layer.layers[0]
    assert len(layer.bn.widths) == len(layer.conv.out_channels) == net.num_widths**2
    means, seen = {}, []
    layer.conv.register_forward_hook(lambda m, i, o: seen.append(o.mean((0, 2, 3))))
    with torch.no_grad():
        for way in all_ways(net):
            net.train()
            index = int(net.configuration(2, way[1], way[0]))
            kept = copy.deepcopy(net.state_dict())
            net.along(x, way)
            net.load_state_dict(kept)
            means[index] = seen.pop()
            torch.testing.assert_close(
                layer.bn.running_mean[index, : len(means[index])], means[index], rtol=1e-4, atol=1e-4
            )
    assert len(means) == len(all_ways(net))
    at_two = [mean for index, mean in means.items() if index // net.num_widths == 2]
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(at_two, 2))


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_a_way_that_was_not_calibrated_shares_what_its_last_width_has(name, options):
    net = network(name, options, calibrated=False)
    calibrate(net, [batch(64)[0]], range(net.num_widths), [(0, 2)])
    assert uncalibrated(net) == []
    norms = [m for m in net.modules() if len(getattr(m, "widths", ())) == net.num_widths**2 and hasattr(m, "bias")]
    norms = [norm for norm in norms if hasattr(norm, "running_mean")]
    assert norms
    for norm in norms:
        mean = norm.running_mean.view(net.num_widths, net.num_widths, -1)
        for width in range(net.num_widths):
            for before in range(net.num_widths):
                same = torch.equal(mean[width, before], mean[width, width])
                assert same == ((before, width) != (0, 2))
    with pytest.raises(RuntimeError, match=r"calibration reached no batch at: "):
        calibrate(net, [batch(8)[0]], [0])


def test_configurations_of_a_way():
    net = network(*WAYS[1], calibrated=False)
    assert net.configuration(1, 2, 0) == 2 and net.configuration(2, 2, 1) == 7 and net.configuration(2, -1, 2) == 8
    assert network(*CASES[3], calibrated=False).configuration(2, 2, 1) == 2
    width, before = torch.tensor([0, 2, 1]), torch.tensor([2, 0, 1])
    assert net.configuration(2, width, before).tolist() == [2, 6, 4]
    weights = net.configuration(2, F.one_hot(width, 3).float(), F.one_hot(before, 3).float())
    assert torch.equal(weights, F.one_hot(torch.tensor([2, 6, 4]), 9).float())
    a, b = torch.rand(2, 2), torch.rand(2, 2)  # of the first two widths
    both = net.configuration(2, a, b)
    assert both.shape == (2, 6) and torch.allclose(both.view(2, 2, 3)[:, 1, 0], a[:, 1] * b[:, 0])
    with pytest.raises(ValueError, match="statistics must be one of width, way, got 'all'"):
        network("ds_resnet", {**TWO["ds_resnet"], "statistics": "all"})
