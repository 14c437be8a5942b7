"""What a launch is about, as the kernels see it: tensors, windows, maps and tile sizes.

Kernels take these tuples whole. Their members are pointers, numbers, and compile-time constants
(wrapped in tl.constexpr by the functions of arguments.py); an absent tensor is None, and code that
asks ``is None`` is resolved when the kernel is compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

# The codes of the C ABI, in its order.
SOFTMAX = tl.constexpr(0)
EXP = tl.constexpr(1)
ELU1 = tl.constexpr(2)
RELU = tl.constexpr(3)
IDENTITY = tl.constexpr(4)
FAVOR = tl.constexpr(5)
SLIDING = tl.constexpr(0)
TERRACE = tl.constexpr(1)

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2 e), and exp2 is an instruction
# Below every score: the maximum of no keys. Not -inf, since exp2(-inf + inf) is not 1.
LOWEST = tl.constexpr(-1e30)
LN2 = tl.constexpr(0.6931471805599453)
# Gates count as this at least, and for lambda as its opposite at most, lest a query with one kind
# of keys alone divide zero by zero. -80 would do, but its 1 / den times a gradient overflows.
LEAST_GATE = tl.constexpr(-60.0)


class Rows(NamedTuple):
    """[B, H, T, width]: a pointer and strides in elements; the last dimension is contiguous."""

    pointer: Any
    batch: Any
    head: Any
    token: Any  # constant: distances within a tile then need no registers
    width: Any  # constant


class Arithmetic(NamedTuple):
    """Products of computed tiles (features, weights, states): their dtype and precision."""

    dtype: Any
    precision: Any


class Map(NamedTuple):
    """A feature map (SPEC 1). Without a weight the input itself is the feature."""

    weight: Any  # [Hf, D, f] fp32, contiguous, or None
    bias: Any  # [Hf, f] or None
    eps: Any
    group: Any  # constants from here on: query heads per map
    activation: Any
    two_sided: Any
    skip: Any
    head_dim: Any  # D
    width: Any  # f
    block: Any  # f, rounded up to a tile
    resident: Any  # whether the weight is one tile that stays with the program
    slice: Any  # else how many columns of x are projected at a time


class Sequences(NamedTuple):
    """N sequences: the rows of a batch, ranges of one packed row, or the real tokens of rows."""

    tokens: Any  # T
    bounds: Any  # cu_seqlens [N + 1], or None
    index: Any  # [N, T] int32, the token at each position of a padded row, or None
    lengths: Any  # [N] int32, how many positions a padded row has, or None


class Window(NamedTuple):
    """Windows and sinks (SPEC 2), and what follows from them for chunks of C tokens.

    Chunk c of the queries weighs the tiles of keys from first_tile(c) to c pair by pair; the state
    holds those before.
    """

    size: Any  # w, and 0 without a window
    kind: Any
    sink: Any
    sink_block: Any  # s, rounded up to a tile
    carried: Any  # the most of c - first_tile(c), where chunks carry as many tiles on, else 0
    read_again: Any  # whether there are older tiles that are not carried
    near_linear: Any  # whether tile c can hold keys that are weighed by features
    far_linear: Any  # whether an older tile can


class Problem(NamedTuple):
    """An attention: hybrid (SPEC 3) with a gate, linear (SPEC 4) without."""

    q: Rows
    k: Rows
    v: Rows
    map_q: Map
    map_k: Map
    gate: Any  # [H] or None
    scale: Any
    sequences: Sequences
    window: Window
    arithmetic: Arithmetic
    affine: Any  # constants from here on, but for the last two
    heads: Any  # H; in hybrid_attention_step.py Hs, the heads of the state
    group: Any  # of them, those per key/value head
    chunk: Any  # C, tokens of a chunk and keys of a tile
    block_d: Any  # D, rounded up to a tile
    block_v: Any  # columns of V that a program takes
    slices: Any  # programs that share a head's columns of V
    segments: Any  # programs that share a sequence
    segment_chunks: Any  # chunks of each


class Place(NamedTuple):
    """What a program works on."""

    n: Any  # sequence
    batch: Any  # its row
    first: Any  # its first token in the row
    length: Any
    head: Any  # query head
    part: Any  # slice of V
    column: Any  # its first column
    segment: Any
    index: Any  # number of the (sequence, head, segment)


class Split(NamedTuple):
    """A weight in the dtype of products: rounded, and what rounding left, None for nothing.

    What z is off by is a relative error of its exponential, and the gradients of ``exp`` and
    ``relu`` go elsewhere as a whole where another z is the largest, or above zero.
    """

    high: Any
    low: Any


class Sides(NamedTuple):
    """Something for each side of a two-sided feature map; minus is None for one-sided ones.

    The sides are two tiles, not one of twice the width: each is normalised by itself.
    """

    plus: Any
    minus: Any


class State(NamedTuple):
    """BLOCK_V columns of a recurrent state (SPEC 5)."""

    kv: Sides  # [f, BLOCK_V] each
    ksum: Sides  # [f] each


class Pool(NamedTuple):
    """States that are updated in place (SPEC 5)."""

    kv: Any  # [P, Hs, F, V] fp32, contiguous
    ksum: Any  # [P, Hs, F]
    k_ring: Any  # Rows [P, Hk, R, D], or None for R = 0
    v_ring: Any
    k_sink: Any  # Rows [P, Hk, s, D], or None for s = 0
    v_sink: Any
    length: Any  # [P] int64
    folded: Any
    slots: Any  # [N], where the state of each sequence is, or None: in the order of the sequences
    size: Any  # P as a float, on which Triton does not specialise
    ring: Any  # R, constant
    slack: Any  # constant


class Group(NamedTuple):
    """Tiles of a program that serves all query heads of a state; all constant."""

    heads: Any  # query heads per state head
    keys: Any  # keys that are attended by softmax at a time
    folds: Any  # keys whose features are made at a time


class Past(NamedTuple):
    """What a sequence remembers before and after a call, in positions."""

    slot: Any  # of the pool
    known: Any  # whether the pool has it: if not, a program has nothing to do
    length: Any  # tokens before the call
    total: Any  # tokens after it
    start: Any  # the state holds [s, start) before
    end: Any  # and [s, end) after
    folded: Any  # what the pool calls ``folded`` after, which may be in the midst of the sinks


class Remembered(NamedTuple):
    """BLOCK successive positions whose keys and values lie in the pool or among the new tokens."""

    k: Any  # pointers to the rows, [BLOCK]
    v: Any
    position: Any  # [BLOCK]
    valid: Any  # [BLOCK]


class Sums(NamedTuple):
    """Of the queries of a chunk: the maximum in units of log2 e, denominator and numerator."""

    m: Any  # [C]
    den: Any  # [C]
    acc: Any  # [C, BLOCK_V]
