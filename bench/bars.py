"""The bars: what is claimed of the standard set, as ratios of numbers of one run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import published
from .cases import (
    BACKWARD,
    BACKWARD_BF16,
    BF16,
    FEATURES,
    FILLING_DECODE,
    FORWARD_BF16,
    FOUR_HEADS,
    HYBRID,
    LINEAR,
    LONG,
    LONGEST,
    ONE_HEAD,
    ONE_SEQUENCE,
    PUBLISHED,
    SHORT,
    SMOLLM2,
    STEPS,
    TRAINING,
    TRANSFER,
    WIDE,
    WIDE_BF16,
    Case,
)
from .results import Results


@dataclass(frozen=True)
class Quantity:
    """A number of the results: one column of the row of an implementation in a case."""

    case: Case
    implementation: str = "lolcats"
    column: str = "median_s"


@dataclass(frozen=True)
class Bar:
    """What is claimed: sum(over) / sum(under) is at least or at most a limit.

    Without a limit, what a claim beside it is to be read by.
    """

    claim: str
    over: tuple[Quantity, ...]
    under: tuple[Quantity, ...] = ()  # none: 1
    at_least: float | None = None
    at_most: float | None = None
    isas: tuple[str, ...] = ()  # the instruction sets it is about; none: all
    machine: str | None = None  # part of the name of the machine it is about
    threads: int = 1  # what it is about takes as many

    def show(self, value: float) -> str:
        """A value of this bar as people read it."""
        seconds = not self.under and self.over[0].column == "median_s"
        return f"{value * 1e6:.3g} us" if seconds else f"{value:.3g}"

    @property
    def limit(self) -> str:
        """The bar itself, or nothing."""
        if self.at_least is not None:
            return f">= {self.show(self.at_least)}"
        return "" if self.at_most is None else f"<= {self.show(self.at_most)}"


@dataclass(frozen=True)
class Verdict:
    """What a run says of a bar. ``why_not`` is empty where it was measured."""

    bar: Bar
    value: float | None = None
    why_not: str = ""
    steady: bool = True  # all of its rows

    @property
    def met(self) -> bool:
        """Whether it was measured and holds."""
        if self.value is None:
            return False
        if self.bar.at_least is not None:
            return self.value >= self.bar.at_least
        return self.bar.at_most is None or self.value <= self.bar.at_most

    @property
    def result(self) -> str:
        """met, missed, or not measured and why; nothing where there is no limit."""
        if self.why_not:
            return f"not measured: {self.why_not}"
        if not self.bar.limit:
            return ""
        return ("met" if self.met else "missed") + ("" if self.steady else ", unsteady")


def judge(bar: Bar, results: Results) -> Verdict:
    """Measures a bar by the rows of a run."""
    steady = True
    for quantity in bar.over + bar.under:
        case, name = str(quantity.case), quantity.implementation
        row = results.find(case, name)
        if row is None:
            reasons = (
                s.reason for s in results.skips if (s.case, s.implementation) == (case, name)
            )
            return Verdict(bar, why_not=f"{name}: {next(reasons, 'not in this run')}")
        if getattr(row, quantity.column) is None:
            return Verdict(bar, why_not=f"this system does not tell {quantity.column}")
        if bar.isas and row.isa not in bar.isas:
            return Verdict(bar, why_not=f"{row.isa} ran, the bar is of {' or '.join(bar.isas)}")
        if bar.machine is not None and bar.machine not in row.machine:
            return Verdict(bar, why_not=f"{row.machine} ran, the bar is of an {bar.machine}")
        if quantity.implementation == "lolcats" and row.threads < bar.threads:
            return Verdict(bar, why_not=f"{row.threads} thread ran, it takes {bar.threads}")
        steady = steady and row.steady
    over, under = (
        sum(getattr(results.find(str(q.case), q.implementation), q.column) for q in quantities)
        for quantities in (bar.over, bar.under)
    )
    return Verdict(bar, over / (under if bar.under else 1), steady=steady)


def _faster(claim: str, case: Case, peer: str, ratio: float, **others: int) -> Bar:
    return Bar(claim, (Quantity(case, peer),), (Quantity(case),), at_least=ratio, **others)


def _rate(claim: str, case: Case, limit: float, implementation: str = "lolcats") -> Bar:
    quantity = Quantity(case, implementation, "ceiling_fraction")
    return Bar(claim, (quantity,), at_least=limit)


_CPU = (
    _faster("hybrid forward, T=2048: faster than SDPA", HYBRID, "sdpa", 4),
    _faster("hybrid forward, T=8192: faster than SDPA", LONG, "sdpa", 16),
    _faster("hybrid forward, T=2048: faster than quadratic, eager", HYBRID, "quadratic", 100),
    _faster("hybrid forward, T=2048: faster than chunkwise, eager", HYBRID, "chunkwise", 4),
    _faster("hybrid forward, T=2048: faster than its loop over chunks, eager", HYBRID, "loop", 4),
    _faster(
        "hybrid forward, T=2048: faster than chunkwise, compiled", HYBRID, "compiled:chunkwise", 3
    ),
    _rate("hybrid forward, D=64: useful FLOP rate / torch.mm", LONG, 0.9),
    _rate("hybrid forward, D=128: useful FLOP rate / torch.mm", WIDE, 0.9),
    _rate("the same on AVX2, D=64: / AVX2 torch.mm", LONG, 0.85, "lolcats:avx2"),
    _rate("the same on AVX2, D=128: / AVX2 torch.mm", WIDE, 0.85, "lolcats:avx2"),
    *(
        Bar(
            f"hybrid forward, D={wide.D}: bf16 faster than fp32",
            (Quantity(wide),),
            (Quantity(half),),
            at_least=1.8,
            isas=("amx", "avx512_bf16"),
        )
        for wide, half in ((LONG, BF16), (WIDE, WIDE_BF16))
    ),
    *(
        Bar(f"hybrid backward / forward, {b.dtype}", (Quantity(b),), (Quantity(f),), at_most=2.5)
        for b, f in ((BACKWARD, HYBRID), (BACKWARD_BF16, FORWARD_BF16))
    ),
    _faster("hybrid forward + backward, T=2048: faster than SDPA", TRAINING, "sdpa", 3),
    Bar(
        "attention_transfer + gradients / (SDPA forward + hybrid forward + backward)",
        (Quantity(TRANSFER),),
        (Quantity(HYBRID, "sdpa"), Quantity(TRAINING)),
        at_most=1.0,
    ),
    _faster("feature_map, 64k tokens: faster than eager", FEATURES, "eager", 4),
    _faster("linear_attention, F=128: faster than chunkwise, eager", LINEAR, "chunkwise", 4),
    _faster("linear_attention, F=128: faster than its loop over chunks, eager", LINEAR, "loop", 4),
    _faster(
        "linear_attention, F=128: faster than the sequential product", LINEAR, "sequential", 15
    ),
    _rate("step, states beyond the caches: bandwidth / copy", STEPS, 0.75),
    Bar("step, one sequence of SmolLM2-135M", (Quantity(SMOLLM2),), at_most=15e-6),
    Bar(
        "the same without torch, on NumPy arrays", (Quantity(SMOLLM2, "lolcats_c"),), at_most=15e-6
    ),
    Bar(
        "hybrid forward: time at T=65536 / at T=4096",
        (Quantity(LONGEST),),
        (Quantity(SHORT[-1]),),
        at_most=1.05 * 16,
    ),
    _faster(
        "hybrid forward, one head: all threads faster than one",
        ONE_HEAD,
        "lolcats:one_thread",
        1.8,
        threads=2,
    ),
    Bar(  # where two threads do not have two whole cores, neither case has
        "four heads of a quarter of its length: all threads faster than one",
        (Quantity(FOUR_HEADS, "lolcats:one_thread"),),
        (Quantity(FOUR_HEADS),),
        threads=2,
    ),
    Bar(
        "hybrid forward: extra memory / q, k, v, o",
        (Quantity(LONG, column="extra_bytes"),),
        (Quantity(LONG, column="bytes"),),
        at_most=0.25,
    ),
)

_GPU = tuple(
    Bar(
        f"{case.op} {pass_}, B={shape[0]} T={shape[1]} H={shape[2]} D={shape[3]}: "
        f"half of the published {min(published.MILLISECONDS[shape][pass_]):g} ms",
        (Quantity(case),),
        at_most=0.5e-3 * min(published.MILLISECONDS[shape][pass_]),
        machine=published.GPU,
    )
    for (shape, pass_), case in PUBLISHED.items()
) + tuple(
    Bar(
        f"decode, {case.B} sequences: CUDA C++ as fast as Triton, as CUDA graphs",
        (Quantity(case, "graph:lolcats:triton"),),
        (Quantity(case, "graph:lolcats:cuda"),),
        at_least=1.0,
    )
    for case in (replace(FILLING_DECODE, T=ONE_SEQUENCE.T), ONE_SEQUENCE)
)
BARS: dict[str, tuple[Bar, ...]] = {"cpu": _CPU, "cuda": _GPU}  # by device
