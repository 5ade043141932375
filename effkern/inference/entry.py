"""``effkern.optimize``: from a network to its optimized form."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils import _pytree as pytree

from effkern import _library
from effkern.inference import functional, lowering, passes
from effkern.inference.module import Optimized
from effkern.inference.network import Network
from effkern.inference.report import Report, Row
from effkern.inference.swap import swap
from effkern.inference.tracing import (
    SKIPPING,
    CannotTrace,
    alike,
    bake_blocks,
    fixed_arguments,
    is_torch_layer,
    kept_whole,
    trace,
)
from effkern.nn import SkipBlock
from effkern.ops._memo import available
from effkern.ops._pack import CACHE_BYTES


def optimize(model: nn.Module, example_input: Any = None, cache_bytes: int = CACHE_BYTES) -> Optimized:
    """The same network on effkern's ops, for inference on the CPU.

    Batch norms are folded (in fp64, rounded once), branches of re-parameterizable blocks are merged, and convolution,
    bias, residual sum and activation (relu, relu6, hardswish, silu) become one call with a weight packed beforehand.
    Inside, maps are channels_last. Everything else runs as before. ``model`` is not changed and shares nothing with the
    result; inputs are never written to, also where the original's in-place layers would, but by what keeps its forward.

    Works on any module: its forward is traced (torch.fx); a submodule that cannot be traced keeps its forward, and its
    children are optimized one by one. Left as they are, with the reason in the report: modules with hooks, other dtypes
    than float32, bfloat16 and float16, convolutions that are not 2-d, and whatever effkern has no op for.
    Parametrized weights (``torch.nn.utils.parametrize``) are baked.

    Args:
        model: in eval mode. Its weights are read now: later changes are not followed.
        example_input: an input of the model, or a tuple of its positional arguments. Without it, arguments of
            ``forward`` that have a default always have that value; with it, those that hold no tensor have the value
            they have here. Where the graph does not tell, it also shows which sums are of equal shapes; and the result
            is run on it once and compared (``report().error``).
        cache_bytes: what of the processor's last cache the packed weights may fill, 12 MiB unless told. Where a network
            stays below it, the Winograd transforms of its 3x3 kernels are packed too: four times the memory of such
            a weight, which calls then need not make. 0: no transforms. The result's bits do not depend on it.

    Returns:
        A module that is called like ``model`` and returns the same values in the same containers, dtypes and memory
        formats; it differs by rounding. ``print(result.report())`` says what was done. Attributes and other methods
        of ``model`` are not kept.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if it, or a batch norm in it, is in training mode, or it is wrapped for parallel training, or
            ``cache_bytes`` is negative.
        RuntimeError: if the result does not fit the original on ``example_input``.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> fast = optimize(net)
    >>> torch.allclose(fast(torch.ones(1, 3, 8, 8)), net(torch.ones(1, 3, 8, 8)), atol=1e-6)
    True
    >>> print(fast.report().replaced[0].detail)
    0: 3->8 3x3 relu
    """
    _check(model)
    if cache_bytes < 0:
        raise ValueError(f"optimize: cache_bytes must not be negative, got {cache_bytes}")
    example = _as_tuple(example_input)
    try:
        twin = copy.deepcopy(model)
    except RuntimeError as error:  # a tensor that is part of a graph, as torch.nn.utils.weight_norm leaves behind
        raise ValueError(
            f"optimize: model cannot be copied ({error}); run it once under torch.no_grad(), or use "
            "torch.nn.utils.parametrizations"
        ) from None
    with torch.no_grad():
        return _Builder(cache_bytes).whole(twin, example, model)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ValueError(f"optimize: model is wrapped in {type(model).__name__}; optimize its .module")
    if hasattr(model, "_orig_mod"):
        raise ValueError("optimize: model is compiled; optimize the original, then compile the result")
    if model.training:
        raise ValueError("optimize: model is in training mode; call model.eval() first")
    for name, module in model.named_modules():
        if module.training and isinstance(module, _BatchNorm):
            raise ValueError(f"optimize: batch norm {name!r} is in training mode; call model.eval() first")


def _is_known(node: fx.Node) -> bool:
    """Whether a call runs nobody's code but torch's, effkern's and Python's own."""
    if node.op != "call_function" or functional.is_torch_function(node.target):
        return True
    return getattr(node.target, "__module__", "").split(".")[0] in ("effkern", "builtins", "collections")


def _as_tuple(example: Any) -> tuple[Any, ...] | None:
    if example is None:
        return None
    return example if isinstance(example, tuple) else (example,)


class _Builder:
    """Optimizes a copy of a network, piece by piece where it has to be."""

    def __init__(self, cache_bytes: int) -> None:
        self.handles = lowering.Handles(cache_bytes)
        self.swapped = nn.ModuleList()
        self.called: dict[
            str, tuple[Any, ...] | None
        ] = {}  # how the example's run called each module, see _noting_calls
        self.rows: list[Row] = []

    def whole(self, model: nn.Module, example: tuple[Any, ...] | None, original: nn.Module) -> Optimized:
        if isinstance(model, Optimized):
            return model
        bake_blocks(model)
        expected = None
        if example is not None:
            with _noting_calls(original) as self.called:
                expected = original(*_copies(example))
        rows: list[Row] = []
        try:
            if not available():
                missing = _library.missing.get("_C", "no host module")
                raise CannotTrace(f"effkern's native library is not loaded: {missing}")
            result, rows = self.build(model, "", example)
        except CannotTrace as why:
            result = Optimized.around(model)
            rows.append(Row("left", "", type(model).__name__, str(why)))
            if available():
                self.descend(model, "")
        if len(self.swapped):
            result.add_module("_swapped", self.swapped)
        result.requires_grad_(False)
        self.handles.expect_blocks([module for module in result.modules() if isinstance(module, SkipBlock)])
        result._report = Report(rows + self.rows)
        if example is not None:
            result._report.error = _compare(expected, result(*_copies(example)))
        return result

    def build(self, module: nn.Module, path: str, example: tuple[Any, ...] | None) -> tuple[Optimized, list[Row]]:
        """The optimized form of a module, and what there is to tell about it.

        Raises:
            CannotTrace: if there is none.
        """
        if isinstance(module, SKIPPING):
            raise CannotTrace(lowering.OWN)
        fixed = fixed_arguments(module, self.called.get(path) if example is None else example)
        network = self._traced(module, path, fixed, example)
        for optimization in passes.PASSES:
            optimization(network)
        lowering.lay_out(network)
        tensors = lowering.lower(network, self.handles)
        functional.restore_dtypes(network)
        rows = lowering.describe(network)
        modules = self._flatten(network, tensors)
        network.graph.lint()
        for name in network.opaque:
            part = module.get_submodule(name)
            if any(part is used for used in modules.values()):
                self.descend(part, ".".join(p for p in (path, name) if p))
        others = bool(network.opaque) or not all(map(_is_known, network.graph.nodes))
        signature = inspect.signature(module.forward)
        name = type(module).__name__
        return Optimized.of_graph(network.graph, modules, tensors, signature, fixed, name, others), rows

    def _traced(self, module: nn.Module, path: str, fixed: dict[str, Any], example: tuple[Any, ...] | None) -> Network:
        """The graph, free of writes. What cannot be written without them is called as it is."""
        whole: dict[str, str] = {}
        while True:
            graph, opaque = trace(module, fixed, whole)
            network = Network(module, graph, opaque, path)
            if example is not None:
                _record_shapes(network, [value for value, name in _named(module, example) if name not in fixed])
            passes.drop_what_does_nothing(network)
            try:
                functional.functionalize(network)
            except CannotTrace as why:
                if not why.module or why.module in whole:
                    raise
                whole[why.module] = f"cannot be taken apart: {why}"
            else:
                return network

    def _flatten(self, network: Network, tensors: dict[str, Tensor]) -> dict[str, nn.Module]:
        """Give what is left in the graph names without dots; returns the modules, adds the constants."""
        modules: dict[str, nn.Module] = {}
        names: dict[tuple[str, str], str] = {}
        for node in network.graph.nodes:
            if node.op not in ("call_module", "get_attr") or node.target in tensors:
                continue
            key = (node.op, str(node.target))
            if key not in names:
                name = lowering.unique(lowering.flat(key[1]), [*modules, *tensors])
                if node.op == "call_module":
                    modules[name] = network.called(node)
                else:
                    value = network.constant(node)
                    if value is None:
                        raise CannotTrace(f"{key[1]} is no tensor")
                    tensors[name] = value.detach()
                names[key] = name
            node.target = names[key]
        return modules

    def descend(self, parent: nn.Module, path: str) -> None:
        """Optimize the children of a module whose own forward stays as it is."""
        if isinstance(parent, SKIPPING):
            return
        for name, child in list(parent.named_children()):
            if "_optimized" in vars(child):
                continue
            where = f"{path}.{name}" if path else name
            container = isinstance(child, nn.ModuleList | nn.ModuleDict)
            if not container and kept_whole(child) is None:
                try:
                    result, rows = self.build(child, where, None)
                except CannotTrace as why:
                    if not is_torch_layer(child):
                        self.rows.append(Row("left", where, type(child).__name__, str(why)))
                else:
                    if any(row.action == "replaced" for row in rows):
                        if isinstance(child, nn.Sequential):  # it may be iterated over instead of called
                            quiet, self.rows = self.rows, []
                            self.descend(child, where)
                            self.rows = quiet
                        self.rows += rows
                        self.swapped.append(result)
                        swap(child, result)
                        continue
                    if is_torch_layer(child):
                        self.rows += rows
            elif not container:
                self.rows.append(Row("left", where, type(child).__name__, str(kept_whole(child))))
            if not is_torch_layer(child):
                self.descend(child, where)


_SEEN = torch.empty(0)  # stands for any tensor


@contextlib.contextmanager
def _noting_calls(model: nn.Module) -> Iterator[dict[str, tuple[Any, ...] | None]]:
    """By name, the arguments each module inside is called with; None where calls differ in what varies.

    A child whose parent cannot be traced is then optimized for the arguments it gets, a mask among them.
    """
    noted: dict[str, tuple[Any, ...] | None] = {}
    handles = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        call.apply_defaults()
        plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in call.signature.parameters.values())
        # Only what varies is of interest: inputs of every layer would fill the memory.
        found = pytree.tree_map_only(Tensor, lambda _: _SEEN, tuple(call.arguments.values())) if plain else None
        before = noted.setdefault(name, found)
        if found is None or before is None or not alike(before, found):
            noted[name] = None

    def hook(name: str) -> Callable[..., None]:
        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with contextlib.suppress(Exception):  # whatever forward is: the example's run is to show, not to fail
                note(name, module, args, kwargs)

        return run

    try:
        for name, module in model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def _named(module: nn.Module, example: tuple[Any, ...]) -> list[tuple[Any, str]]:
    return list(zip(example, inspect.signature(module.forward).parameters, strict=False))


def _record_shapes(network: Network, inputs: list[Any]) -> None:
    """Run the traced graph once and note the shape and dtype of every tensor in it.

    On two copies of a single image, if it takes them: one sample would make a sum with a parameter, or with a mean over
    the batch, look like a sum of equal shapes.
    """

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                n.meta["example"] = (tuple(value.shape), value.dtype)
            return value

    recorder = Recorder(network.root, graph=network.graph)
    single = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    if single and all(t.dim() > 1 and t.size(0) == 1 for t in single):
        with contextlib.suppress(Exception):  # whatever a network may say to two images where it expects one
            recorder.run(*pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), inputs))
            return
    recorder.run(*_copies(inputs))


def _copies(values: Any) -> Any:
    """The same values in memory of their own: the original may write into its inputs."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), values)


def _compare(expected: Any, result: Any) -> float:
    """Largest difference in units of the largest finite value; checks that containers, shapes and dtypes agree."""
    ours, theirs = pytree.tree_flatten(result), pytree.tree_flatten(expected)
    if ours[1] != theirs[1]:
        raise RuntimeError(f"optimize: the optimized network returns {ours[1]}, the original {theirs[1]}")
    worst = 0.0
    for y, y0 in zip(ours[0], theirs[0], strict=True):
        if not isinstance(y, Tensor) or not isinstance(y0, Tensor):
            continue
        if y.shape != y0.shape or y.dtype != y0.dtype:
            raise RuntimeError(
                f"optimize: the optimized network returns {list(y.shape)} {y.dtype}, the original "
                f"{list(y0.shape)} {y0.dtype}"
            )
        if y0.numel() and y0.is_floating_point():
            y, y0 = y.double(), y0.double()
            scale = float(y0[y0.isfinite()].abs().amax()) if bool(y0.isfinite().any()) else 0.0
            same = (y == y0) | (y.isnan() & y0.isnan())
            difference = (y - y0).abs().nan_to_num(float("inf")).masked_fill(same, 0)
            worst = max(worst, float(difference.max()) / (scale if scale > 0 else 1.0))
    return worst
