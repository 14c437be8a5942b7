"""What is measured: cases with their useful FLOPs and bytes, and the standard set.

Nothing here needs torch. A case counts work once, as the formula needs it, whoever computes it: no
implementation gains by computing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

from .published import MILLISECONDS

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Case:
    """One row of the table. ``f`` 0 takes q and k as the features; maps are two-sided softmax."""

    op: str
    # "forward", "backward" (alone it reuses one forward's graph), "forward+backward", or "step",
    # which decodes token T.
    pass_: str = "forward"
    B: int = 1
    H: int = 8
    Hk: int = 8
    T: int = 2048  # of a step: the context
    D: int = 64
    V: int = 64
    f: int = 64
    window: int = 64
    dtype: str = "float32"
    peers: tuple[str, ...] = ()  # what the standard set compares with

    def __str__(self) -> str:
        """op-pass-T2048, and whatever differs from the usual."""
        plain = Case(self.op)
        rest = (
            f"{f.name}{getattr(self, f.name)}".removeprefix("dtype")
            for f in fields(self)
            if f.name not in ("op", "pass_", "T", "peers")
            and getattr(self, f.name) != getattr(plain, f.name)
        )
        return "-".join((self.op, self.pass_, f"T{self.T}", *rest))

    @property
    def F(self) -> int:
        """Width of the features."""
        return 2 * self.f if self.f else self.D

    @property
    def tokens(self) -> int:
        """Tokens times heads that one call computes."""
        return self.B * self.H * (1 if self.pass_ == "step" else self.T)

    @property
    def flops(self) -> int:
        """Useful FLOPs, two per multiply-add; exponentials and masked-out products are free.

        Per token and head, forward and step:

            feature_map         2Df
            linear_attention    4Df + 4FV              (two maps; state written and read)
            hybrid_attention    4Df + 4FV + 2w(D + V)  (and the window)
            attention_transfer  the same + (T + 1)(D + V), the causal teacher

        A backward pass has two products for each of the forward's, and what it recomputes is not
        useful: twice the forward. attention_transfer's has parameters alone, hence one, and none
        for the teacher.
        """
        features, state = 2 * self.D * self.f, 4 * self.F * self.V
        window = 2 * self.window * (self.D + self.V)
        forward = {
            "feature_map": features,
            "linear_attention": 2 * features + state,
            "hybrid_attention": 2 * features + state + window,
            "attention_transfer": 2 * features + state + window,
        }[self.op]
        share = 1 if self.op == "attention_transfer" else 2
        passes = {"forward": 1, "step": 1, "backward": share, "forward+backward": 1 + share}
        teacher = 0
        if self.op == "attention_transfer" and self.pass_ != "backward":
            teacher = (self.T + 1) * (self.D + self.V)
        return self.tokens * (passes[self.pass_] * forward + teacher)

    @property
    def bytes(self) -> int:
        """Bytes that must move: every input read once, every output written once.

        A backward pass reads inputs, output and its gradient and writes the inputs' gradients. A
        step reads and writes kv and ksum and reads the window.
        """
        size, tokens = ITEMSIZE[self.dtype], 1 if self.pass_ == "step" else self.T
        if self.op == "feature_map":
            inputs, maps = self.tokens * self.D * size, self.H * self.D * self.f * 4
            output = self.tokens * self.F * size
        else:
            inputs = self.tokens * self.D * size + self.B * self.Hk * tokens * (
                (self.D + self.V) * size
            )
            maps = 2 * self.H * self.D * self.f * 4
            output = self.tokens * self.V * size
        forward, backward = inputs + maps + output, 2 * (inputs + maps + output)
        if self.op == "attention_transfer":  # gradients of parameters alone
            forward, backward = inputs + maps + output, inputs + 2 * maps
        if self.pass_ == "step":
            kv = self.B * self.H * self.F * (self.V + 1) * 4
            return forward + 2 * kv + self.B * self.Hk * self.window * (self.D + self.V) * size
        return {
            "forward": forward,
            "backward": backward,
            "forward+backward": forward + backward,
        }[self.pass_]


HYBRID = Case(
    "hybrid_attention",
    peers=("quadratic", "chunkwise", "loop", "compiled:chunkwise", "sdpa", "flex"),
)
LONG = replace(HYBRID, T=8192, peers=("sdpa", "lolcats:avx2"))
WIDE = replace(HYBRID, T=8192, D=128, V=128, peers=("lolcats:avx2",))
BF16 = replace(LONG, dtype="bfloat16", peers=())
WIDE_BF16 = replace(WIDE, dtype="bfloat16", peers=())
SHORT = tuple(replace(HYBRID, T=T, peers=("sdpa",)) for T in (128, 256, 512, 1024, 4096))
LONGEST = replace(HYBRID, T=65536, peers=())
BACKWARD = replace(HYBRID, pass_="backward", peers=())
BACKWARD_BF16 = replace(BACKWARD, dtype="bfloat16")
FORWARD_BF16 = replace(HYBRID, dtype="bfloat16", peers=())
TRAINING = replace(HYBRID, pass_="forward+backward", peers=("sdpa",))
ONE_HEAD = replace(HYBRID, T=16384, H=1, Hk=1, peers=("lolcats:one_thread",))
FOUR_HEADS = replace(ONE_HEAD, T=4096, H=4, Hk=4)
TRANSFER = Case("attention_transfer", "forward+backward")
FEATURES = Case("feature_map", T=8192, peers=("eager", "compiled:eager"))
LINEAR = Case(
    "linear_attention",
    D=128,
    f=0,
    window=0,
    peers=("chunkwise", "loop", "sequential", "fla", "mamba"),
)
# The states of 1024 sequences are 270 MB: beyond four times the caches of most machines.
STEPS = Case("hybrid_attention", "step", B=1024)
SMOLLM2 = Case("hybrid_attention", "step", H=9, Hk=3, peers=("lolcats_op", "lolcats_c"))
DECODE = tuple(
    Case("hybrid_attention", "step", T=T, peers=("sdpa",)) for T in (64, 256, 1024, 4096, 16384)
)

# Cases that bars compare: they take turns, like the implementations of one.
TOGETHER = (
    (HYBRID, BACKWARD, TRAINING, TRANSFER),
    (FORWARD_BF16, BACKWARD_BF16),
    (SHORT[-1], LONGEST),
    (ONE_HEAD, FOUR_HEADS),
    (LONG, BF16),
    (WIDE, WIDE_BF16),
)


def in_groups(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases in their order, but those of a tuple of TOGETHER beside its first."""
    groups: dict[object, list[Case]] = {}
    for case in cases:
        key = next((together for together in TOGETHER if case in together), case)
        groups.setdefault(key, []).append(case)
    return list(groups.values())


STANDARD: tuple[Case, ...] = (
    HYBRID,
    FORWARD_BF16,
    BACKWARD,
    BACKWARD_BF16,
    TRAINING,
    TRANSFER,
    *SHORT,
    LONGEST,
    LONG,
    BF16,
    WIDE,
    WIDE_BF16,
    ONE_HEAD,
    FOUR_HEADS,
    FEATURES,
    LINEAR,
    STEPS,
    SMOLLM2,
    *DECODE,
)

# For GPUs: bf16, and heads enough to fill one. ``lolcats`` is one of the two, by dispatch.
BACKENDS = ("lolcats:cuda", "lolcats:triton")
PUBLISHED = {
    (shape, pass_): Case(
        "linear_attention", pass_, B, H, H, T, D, D,
        f=0, window=0, dtype="bfloat16", peers=(*BACKENDS, "fla", "mamba"),
    )
    for shape, times in MILLISECONDS.items()
    for pass_ in times
    for B, T, H, D in [shape]
}  # fmt: skip
PUBLISHED_HYBRID = {
    key: replace(case, op="hybrid_attention", f=64, window=64, peers=(*BACKENDS, "sdpa", "flex"))
    for key, case in PUBLISHED.items()
}
FILLING = Case("hybrid_attention", B=4, H=16, Hk=16, dtype="bfloat16", peers=(*BACKENDS, "sdpa"))
FILLING_MAP = replace(FILLING, op="feature_map", T=4096, window=0, peers=BACKENDS)
FILLING_DECODE = Case(  # the heads of Llama 3 8B
    "hybrid_attention", "step", B=64, H=32, Hk=8, D=128, V=128, dtype="bfloat16",
    peers=(*BACKENDS, *(f"graph:{name}" for name in BACKENDS), "sdpa", "graph:sdpa"),
)  # fmt: skip
ONE_SEQUENCE = replace(FILLING_DECODE, B=1, T=4096)
FILLED: tuple[Case, ...] = (
    *PUBLISHED.values(),
    *PUBLISHED_HYBRID.values(),
    *(replace(FILLING, T=T) for T in (256, 1024, 4096, 16384, 65536)),
    *(replace(FILLING_DECODE, T=T) for T in (64, 256, 1024, 4096, 16384)),
    ONE_SEQUENCE,
    FILLING_MAP,
)

CASES = {
    "cpu": STANDARD,
    "cuda": (*FILLED, *STANDARD),
}


def select(patterns: Sequence[str], cases: Sequence[Case] = STANDARD) -> list[Case]:
    """The cases whose names are, contain, or as a glob match any of the patterns; all without one.

    Raises:
        ValueError: a pattern matches none.
    """
    if not patterns:
        return list(cases)
    exact = {str(case): [case] for case in cases}
    found = {
        p: exact.get(p) or [c for c in cases if fnmatchcase(str(c), f"*{p}*")] for p in patterns
    }
    for pattern, matches in found.items():
        if not matches:
            raise ValueError(f"no case matches {pattern!r}")
    return [case for case in cases if any(case in matches for matches in found.values())]
