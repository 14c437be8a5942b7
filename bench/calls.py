"""A peer on the inputs of a case, as one call, and whether it computes what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lolcats_ops import _C, reference

from .cases import Case
from .inputs import Inputs, make_inputs
from .peers import Peer, kind, operators_of, peers

Call = Callable[[], tuple[Tensor, ...]]
# Relative errors: eager formulations round each of their steps, gradients twice.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
GATE_TOKENS = 320  # five windows: the state counts for most of them
GATE_BATCH = 2
GATE_PIECE = 1024  # tokens of a head at full size that the reference takes at once


class WrongResult(RuntimeError):
    """An implementation that does not compute what it says; it gets no time."""


def bind(peer: Peer, inputs: Inputs) -> Call:
    """One call of the case's pass: outputs, or gradients of what the operator differentiates."""
    use_isa(peer.isa)
    pass_ = inputs.case.pass_
    leaves = _leaves(peer, inputs) if "backward" in pass_ else []
    call = peer.prepare[kind(inputs.case)](inputs)
    if not leaves:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return _outputs(call())

        return forward
    output = _outputs(call())[-1]
    seed = _output_gradient(output)
    if pass_ == "backward":
        return lambda: torch.autograd.grad(output, leaves, seed, retain_graph=True)
    return lambda: torch.autograd.grad(_outputs(call())[-1], leaves, seed)


def use_isa(isa: str | None) -> None:
    """Makes our library run on this instruction set, if there is one."""
    if isa is not None:
        _C.set_cpu_isa(isa)


def check(peer: Peer, case: Case, device: str = "cpu") -> None:
    """Compares a short version of the case with the fp64 reference.

    Raises:
        WrongResult: outputs or gradients are off.
    """
    if peer.compiled:
        return  # its outputs at full size are compared with another's
    short = replace(case, T=min(case.T, GATE_TOKENS), B=min(case.B, GATE_BATCH))
    inputs = make_inputs(short, device)
    wide = inputs.wide()
    compare(bind(peer, inputs)(), expected(peer, wide), case)
    if inputs.state is not None and wide.state is not None and peer.computes == "operator":
        after = (tuple(x.state.tensors.values()) for x in (inputs, wide))
        compare(*after, case)


def expected(peer: Peer, inputs: Inputs) -> tuple[Tensor, ...]:
    """What this kind of peer should return."""
    if peer.computes == "softmax":
        truth = Peer("softmax", dict.fromkeys(("hybrid_attention", "step"), _softmax), "softmax")
    else:
        truth = peers()["reference"]
    return bind(truth, inputs)()


def check_whole(result: Tensor, peer: Peer, inputs: Inputs, truths: dict[str, Tensor]) -> None:
    """Compares the output of a forward pass at full size: its first and its last head, all tokens,
    with fp64. ``truths`` has what earlier calls on these inputs found, by what they compute.

    Raises:
        WrongResult: it is off.
    """
    heads = dict.fromkeys([(0, 0), (inputs.case.B - 1, inputs.case.H - 1)])
    if peer.computes not in truths:
        whole = _softmax_in_pieces if peer.computes == "softmax" else _reference_in_pieces
        truths[peer.computes] = torch.cat([whole(inputs.head(*at).wide()) for at in heads])
    got = torch.cat([result[b : b + 1, h : h + 1] for b, h in heads])
    compare((got,), (truths[peer.computes],), inputs.case)


def _reference_in_pieces(x: Inputs) -> Tensor:
    """The reference stores pairs of tokens, so it goes on from a state."""
    outputs, state = [], None
    for piece in _pieces(x):
        if x.case.op == "feature_map":
            outputs.append(operators_of(reference)[x.case.op](piece)())
        else:
            call = operators_of(reference, state=state, return_state=True)[x.case.op]
            y, state = call(piece)()
            outputs.append(y)
    return torch.cat(outputs, 2)


def _softmax_in_pieces(x: Inputs) -> Tensor:
    return torch.cat([_softmax(piece)() for piece in _pieces(x, all_keys=True)], 2)


def _pieces(x: Inputs, all_keys: bool = False) -> Iterator[Inputs]:
    """Successive queries with their keys, or with all keys up to theirs."""
    for start in range(0, x.case.T, GATE_PIECE):
        end = start + GATE_PIECE
        first = {"q": start, "k": 0 if all_keys else start, "v": 0 if all_keys else start}
        rows = {name: x.tensors[name][:, :, i:end] for name, i in first.items()}
        yield replace(x, tensors=x.tensors | rows)


def compare(got: tuple[Tensor, ...], want: tuple[Tensor, ...], case: Case) -> None:
    """||got - want|| <= tolerance * ||want|| for every tensor, and no row of one, such as the
    output of a token, is off by ten times as much of itself, or of what rows usually are.

    Raises:
        WrongResult: it is not so.
    """
    tolerance = TOLERANCE[case.dtype] * (2 if "backward" in case.pass_ else 1)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        truth = b.detach().double()
        if not truth.numel():
            continue
        off, size = a.detach().double() - truth, truth.norm() or torch.ones(())
        rows, own = (x.norm(dim=-1) if x.ndim > 1 else x.norm()[None] for x in (off, truth))
        usual = size.item() / len(rows.flatten()) ** 0.5  # the first rows are much larger
        error = (off.norm() / size).item()
        worst = (rows / own.clamp(min=usual)).max().item()
        if not (error <= tolerance and worst <= 10 * tolerance):  # nan is not
            raise WrongResult(
                f"result {i} is off by {error:.1e}, a row by {worst:.1e}, more than "
                f"{tolerance:.0e}, {10 * tolerance:.0e}"
            )


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _output_gradient(output: Tensor) -> Tensor:
    rng = torch.Generator(output.device).manual_seed(2)
    gradient = torch.empty(output.shape, device=output.device).normal_(generator=rng)
    return gradient.to(output.dtype) if output.ndim else torch.ones_like(output)


def _leaves(peer: Peer, inputs: Inputs) -> list[Tensor]:
    """What a training step takes gradients of; attention transfer's are parameters alone."""
    rows = ["q"] if inputs.case.op == "feature_map" else ["q", "k", "v"]
    parameters = [name for name in inputs.tensors if name not in ("q", "k", "v")]
    if inputs.case.op == "feature_map":
        parameters = ["weight_q"]
    if inputs.case.op == "linear_attention":
        parameters.remove("gate")
    if inputs.case.op == "attention_transfer":
        rows = []
    names = rows if peer.computes == "softmax" else rows + parameters
    return [inputs.tensors[name].requires_grad_() for name in names]


def _softmax(x: Inputs) -> Callable[[], Tensor]:
    keys, values = x.k, x.v
    if x.state is not None:
        k_cache, v_cache = x.cache()
        keys = torch.cat([k_cache[:, :, :-1], x.k], 2)
        values = torch.cat([v_cache[:, :, :-1], x.v], 2)

    def attention() -> Tensor:
        T, S, groups = x.q.shape[2], keys.shape[2], x.case.H // x.case.Hk
        scores = x.q @ keys.repeat_interleave(groups, 1).mT * x.case.D**-0.5
        visible = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return weights @ values.repeat_interleave(groups, 1)

    return attention
