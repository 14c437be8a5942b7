"""Decoding with every setting that the forward pass has, with padding, and rewound."""

from dataclasses import replace

import pytest
import torch
from helpers.cases import Inputs
from helpers.compare import assert_close, assert_same_state
from helpers.states import arguments, case_of, empty_state, feed, on_all, prepare, windows

import lolcats_ops as lo

pytestmark = pytest.mark.usefixtures("one_thread")


@on_all
@windows
@pytest.mark.parametrize(
    "maps",
    [
        {"affine": True, "bias": True},
        {"activation": "exp", "two_sided": False},
        {"activation": "elu1", "skip": True, "f": 16, "affine": True},
        {"activation": "favor"},
    ],
    ids=str,
)
def test_steps_take_every_setting(backend, device, window, kind, sink, slack, maps):
    """One token at a time and several, with affine, a scale, and other maps than Hedgehog's."""
    length = 9
    x = prepare(replace(case_of(window, kind, sink), **maps), length, torch.float32, device)
    wide = Inputs(x.case, {n: t.double() for n, t in x.leaves.items()}, {})
    options = {"affine": x.case.affine, "scale": 0.7}
    final = empty_state(wide, slack)
    want = lo.reference.hybrid_attention_step_(*arguments(wide), final, **options)
    once = lo.hybrid_attention(*arguments(wide), **x.case.windows, **options, backend="reference")
    assert_close("reference", want.float(), once, torch.float32)
    for cuts in ([*range(length + 1)], [0, 4, 5, length]):
        state = empty_state(x, slack)
        out = feed(x, state, cuts, backend=backend, **options)
        assert_close(f"cuts {cuts}", out, want, torch.float32)
        assert_same_state(state, final, torch.float32)
    first, state = lo.hybrid_attention(
        *arguments(x, 0, 4), **x.case.windows, **options, return_state=True, backend=backend
    )
    then = lo.hybrid_attention(
        *arguments(x, 4), **x.case.windows, **options, state=state, backend=backend
    )
    assert_close("continued", torch.cat([first, then], 2), want, torch.float32)


@on_all
@windows
def test_single_tokens_of_a_padded_batch_equal_one_call(backend, device, window, kind, sink, slack):
    """A row whose only token is padding gets 0, and its state is as it was."""
    length = 12
    x = prepare(case_of(window, kind, sink), length, torch.float32, device)
    real = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1], [0] * 5 + [1] * 6 + [0]]).bool()
    real = real.to(device)
    options = {**x.case.windows, "backend": backend, "return_state": True}
    want, final = lo.hybrid_attention(*arguments(x), **options, key_padding_mask=real)
    state, outs = empty_state(x), []
    for i in range(length):
        out, state = lo.hybrid_attention(
            *arguments(x, i, i + 1), **options, key_padding_mask=real[:, i : i + 1], state=state
        )
        outs.append(out)
    out = torch.cat(outs, 2)
    assert_close("out", out, want.double(), torch.float32)
    assert (out.transpose(1, 2)[~real] == 0).all()
    assert_same_state(state, final, torch.float32)


@windows
def test_rewind_refuses_more_than_the_slack(window, kind, sink, slack):
    x = prepare(case_of(window, kind, sink), 30, torch.float32)
    state = empty_state(x, slack)
    feed(x, state, [*range(31)], backend="reference")
    n = next(n for n in range(1, 31) if not _replays(x, state, n))
    assert n > slack
    with pytest.raises(ValueError, match="already folded"):
        state.rewind(n)


def _replays(x, state, n):
    """Whether the state allows n tokens to be taken back; it then takes the next one."""
    try:
        back = state.clone().rewind(n)
    except ValueError:
        return False
    lo.hybrid_attention_step_(*arguments(x, 0, 1), back)  # refuses a state that folded too much
    return True
