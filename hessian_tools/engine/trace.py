"""Trace the curvature product of one batch into a graph of tensor operations, and replay it.

For outputs o = f(w) of a batch and a fixed slope g of the loss by the outputs, reverse mode gives the gradient
J^T g. Differentiated once more, it gives for a vector v and any t

    J v   and   (d/dw v^T J^T g) + J^T t

The Hessian product is the second with t = H_out J v, where H_out is the second derivative of the loss. The
Gauss-Newton product is J^T t. All of it is traced once per shape of the inputs. What does not depend on v is computed
once per batch and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from hessian_tools import nested
from hessian_tools.engine.graph import Rule, StagePart, simplify, split
from hessian_tools.engine.reasons import UntraceableError, reason_of
from hessian_tools.engine.resizing import bytes_of, resized, with_constants
from hessian_tools.engine.rewriting import Rewriting
from hessian_tools.engine.tape import Inside
from hessian_tools.evaluation import twice_differentiable

Forward = Callable[[Sequence[Tensor]], Any]  # parameters, buffers and inputs -> outputs


@dataclass(frozen=True, eq=False)
class Program:
    """The traced product of a batch.

    Attributes:
        parts: One function per stage (see `graph.STAGES`).
        values: Names of the inputs for the weights, buffers and the batch.
        slope: Name of the input g.
        vector: Names of the inputs v, one per selected parameter.
        tangent: Name of the input t.
        constant: Whether the outputs do not depend on the selected parameters. There is only the first part then.
        module: The whole graph, from which `segments` makes other parts.
        results: Its outputs: those of the network, their tangent, and the entries of the product.
        folded: Whether the network runs in another order than its own (`folding`).
        samples: The number of samples of the parts if the graph is for `resizing.SAMPLES` samples; 0 if it is for the
            same number as the parts.
    """

    parts: list[StagePart]
    values: tuple[str, ...]
    slope: str
    vector: tuple[str, ...]
    tangent: str
    constant: bool = False
    module: fx.GraphModule | None = None
    results: tuple[fx.Node, ...] = ()
    folded: bool = False
    samples: int = 0

    @property
    def kept_bytes(self) -> tuple[int, int]:
        """About how many bytes a batch's kept values take: once, and per sample if `samples` is not 0."""
        if self.module is None or self.constant:
            return 0, 0
        needed = {name for part in self.parts[2:] for name in part.inputs}
        found = [bytes_of(n) for n in self.module.graph.nodes if n.name in needed and n.op == "call_function"]
        return sum(once for once, _ in found), sum(each for _, each in found)

    @property
    def nbytes(self) -> int:
        """About how many bytes a batch's kept values take, known without running it."""
        once, each = self.kept_bytes
        return once + each * self.samples

    def with_texts(self, change: Callable[[str], str]) -> Program:
        """Return the product with other texts as arguments of its operations."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, str) else value

        module, nodes = with_constants(self.module, changed)
        parts = [StagePart(with_constants(part.run, changed)[0], part.inputs, part.kept) for part in self.parts]
        return replace(self, parts=parts, module=module, results=tuple(nodes[node] for node in self.results))

    def resized(self, samples: int) -> Program:
        """Return the product for batches of another number of samples, from one that was traced for many."""
        return replace(self, parts=[resized(part, samples) for part in self.parts], samples=samples)


def _program(
    model: nn.Module, names: list[str], chosen: list[str], forward: Forward, second: bool,
    rewriting: Callable[[], Rewriting],
) -> Any:  # fmt: skip
    """Return the function of (values, x, g, v, t) that is traced."""

    def program(values: list[Tensor], x: list[Tensor], g: Tensor, v: list[Tensor], t: Tensor) -> Any:
        state = {name: value.detach() for name, value in zip(names, values, strict=True)}
        w = [state[name].requires_grad_() for name in chosen]
        g = g.detach().requires_grad_()

        def product() -> Any:
            with rewriting():
                o = forward([*state.values(), *x])
            if not isinstance(o, Tensor):
                raise UntraceableError(f"the network returns a {type(o).__name__}, not a tensor")
            if not o.requires_grad:
                return o, None, None
            first = torch.autograd.grad(o, w, g, create_graph=True, allow_unused=True)
            live = [(a, b) for a, b in zip(first, v, strict=True) if a is not None and a.requires_grad]
            slopes, directions = [a for a, _ in live], [b for _, b in live]
            if not live:
                return o, None, None
            if second:
                *image, tangent = torch.autograd.grad([o, *slopes], [*w, g], [t, *directions], allow_unused=True)
            else:
                (tangent,) = torch.autograd.grad(slopes, g, directions, retain_graph=True)
                image = list(torch.autograd.grad(o, w, t, allow_unused=True))
            return o, tangent, image

        inside = {f"model.{name}": t for name, t in state.items()}
        with torch.enable_grad(), twice_differentiable():
            return functional_call(Inside(model, product), inside, ())

    return program


def trace_product(
    model: nn.Module, state: dict[str, Tensor], chosen: list[str], x: Any, outputs: Tensor, second: bool,
    rewriting: Callable[[], Rewriting], rules: Sequence[Rule], forward: Forward | None = None,
    joins: bool = True,
) -> Program:  # fmt: skip
    """Trace the product of a batch.

    Args:
        model: The model. Its state may change.
        state: Its parameters and buffers by name.
        chosen: Names of the selected parameters.
        x: Inputs of the batch. Their values do not matter.
        outputs: Outputs of the batch. Their values do not matter.
        second: Whether the product contains the second derivatives of the model, as that of the Hessian does.
        rewriting: Makes the mode in which the forward pass runs.
        rules: Rules by which the graph is simplified.
        forward: Runs the model on its state and the tensors of x, in another way than its own.
        joins: Whether the summands of a gradient are computed by one operation, which needs all of their values.

    Raises:
        UntraceableError: If the model cannot be traced, as with a branch on the values of a tensor.
    """
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):  # its derivatives are not torch's own
        raise UntraceableError("the network contains a scripted module (torch.jit)")
    parts_of_x, inputs_of, _ = nested.flattened(x)
    plain: Forward = lambda values: nested.call(model, inputs_of(values[len(state) :]))  # noqa: E731
    program = _program(model, list(state), chosen, forward or plain, second, rewriting)
    vector = [torch.zeros_like(state[name]) for name in chosen]
    zeros = outputs.new_zeros(outputs.shape)  # contiguous, as g and t are made
    inputs = (list(state.values()), parts_of_x, zeros, vector, zeros.clone())
    try:
        module = _graph_of(program, inputs)
    except UntraceableError:
        raise
    except Exception as error:
        raise UntraceableError(reason_of(error)) from error
    graph = module.graph
    _refuse_aliases(module, state)
    holders = [n for n in graph.nodes if n.op == "placeholder"]
    count = len(state) + len(parts_of_x)
    groups = [holders[:count], holders[count : count + 1], holders[count + 1 : -1], holders[-1:]]
    for stage, group in enumerate(groups):
        for node in group:
            node.meta["stage"] = stage
    simplify(graph, rules, joins)
    o, tangent, *image = next(n for n in graph.nodes if n.op == "output").args[0]
    parts = split(module, [[o], [], [tangent], image] if tangent is not None else [[o]])
    values, slope, v, t = (tuple(n.name for n in group) for group in groups)
    return Program(parts, values, slope[0], v, t[0], tangent is None, module, (o, tangent, *image), forward is not None)


def _graph_of(program: Callable[..., Any], inputs: tuple[Any, ...]) -> fx.GraphModule:
    """Trace a function with fake tensors into a graph without operations in place.

    Raises:
        UntraceableError: If the function draws random numbers.
    """
    module: fx.GraphModule = make_fx(program, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    _name_dtypes(module.graph)
    module.recompile()
    ops = [n.target for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    for op in ops:
        if torch.Tag.nondeterministic_seeded in op.tags:
            raise UntraceableError(f"the forward pass draws random numbers ({op})")
    if any(op._schema.is_mutable for op in ops):
        with torch.no_grad():
            functional = torch.func.functionalize(module)
            module = make_fx(functional, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        _keep_inputs(module.graph)
    return module


def _name_dtypes(graph: fx.Graph) -> None:
    """Give new tensors the dtype that they had while traced, because torch's default is another one at other times."""
    for node in graph.nodes:
        new = isinstance(node.target, torch._ops.OpOverload) and not any(isinstance(a, fx.Node) for a in node.args)
        if new and any(a.name == "dtype" for a in node.target._schema.arguments) and node.kwargs.get("dtype") is None:
            node.update_kwarg("dtype", node.meta["val"].dtype)


def _refuse_aliases(module: fx.GraphModule, state: dict[str, Tensor]) -> None:
    """Raise UntraceableError if a parameter or buffer is used in another way than as an attribute of its module.

    The graph would contain it as a constant, without a derivative.
    """
    names = {t.untyped_storage()._cdata: name for name, t in state.items()}
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(held := getattr(module, node.target), Tensor):
            name = names.get(held.untyped_storage()._cdata)
            if name is not None:
                raise UntraceableError(
                    f"the model uses '{name}' through a list, or another place outside of its module"
                )


def _keep_inputs(graph: fx.Graph) -> None:
    """Remove the last writes into the inputs, with which the network changes its buffers."""
    for node in reversed(graph.nodes):
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder":
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)


def run_stage(program: Program, stage: int, values: dict[str, Tensor]) -> list[Tensor]:
    """Run one stage. Its kept values are added to `values`.

    Returns:
        The outputs of the stage.
    """
    part = program.parts[stage]
    found = part.run(*(values[name] for name in part.inputs))
    count = len(found) - len(part.kept)
    values.update(zip(part.kept, found[count:], strict=True))
    return list(found[:count])
