"""The page of a run: the bars first, then every row, in Markdown."""

from __future__ import annotations

from pathlib import Path

from . import published
from .bars import BARS, Verdict, judge
from .cases import PUBLISHED, PUBLISHED_HYBRID, Case
from .device import CEILINGS
from .gpu_model import interval
from .results import UNSTEADY, Results, Row

PLOTS = {
    "time.png": "Time against T",
    "decode.png": "Decoding against the context",
    "roofline.png": "Roofline",
    "ceilings.png": "Shares of the ceilings",
}
BAR_HEAD = ("claim", "bar", "measured", "result")
PUBLISHED_HEAD = (
    "B, T, H, D",
    "pass",
    *(f"{source}, published" for source in published.SOURCES),
    "linear_attention",
    "hybrid_attention",
    "flash-linear-attention",
)
PUBLISHED_ABOUT = (
    f"Milliseconds, bf16. The published times are of linear attention on an {published.GPU}; the "
    "other columns are of this run, hybrid attention with maps of f=64 and a window of 64."
)
MODEL_HEAD = ("case", "architecture", "MODEL, not measured", "measured", "which is")
BASE_HEAD = ("case", "commit", "its time", "this one's", "times faster")
STEADY = 1.25  # torch.mm of an idle machine varies by a tenth
METHOD = """\
{turns} Times are medians. Before any timing, each implementation is compared with the fp64
reference on a short version of the case; at full size forward passes with it in two heads, all
tokens, gradients and steps with one another. GFLOP/s counts useful FLOPs: what the formula needs,
the same for all, nothing for masked tiles. The ceiling of a row is what the roofline of torch.mm
({size}^3) and a copy ({copy} MB, bytes read and written) allows, on as many threads. {more} Extra
memory is the peak of one call beyond its inputs and outputs."""
TURNS = {
    "cpu": "The implementations of a case, and of cases that a bar compares, run in turns "
    "that are spread over the same time, with torch.mm and a copy among them; a turn counts for "
    "one sample, the median of its calls.",
    "cuda": "Calls are timed by the GPU's own clock and begin with an empty L2 "
    "(triton.testing.do_bench), in turns with torch.mm and a copy.",
}
MORE = {
    "cpu": "torch.mm is of bf16 for bf16 where the CPU multiplies that, else of fp32; for rows on "
    "AVX2 that of a process with ATEN_CPU_CAPABILITY=avx2 and MKL_ENABLE_INSTRUCTIONS=AVX2. Freed "
    "memory stays with the process, so that calls do not begin with page faults.",
    "cuda": "torch.mm is of the case's number type. sdpa is what torch chooses: FlashAttention "
    "where that takes the case.",
}


def verdicts(results: Results) -> list[Verdict]:
    """Of every bar whose quantities this run measured, or says why it did not."""
    known = {(x.case, x.implementation) for x in (*results.rows, *results.skips)}
    return [
        judge(bar, results)
        for bar in BARS[results.device]
        if {(str(q.case), q.implementation) for q in bar.over + bar.under} <= known
    ]


def base_rows(results: Results) -> list[tuple[str, str, str, str, str]]:
    """Case, other commit, its time, ours, and how many times faster ours is."""
    rows = []
    for base in results.rows:
        ours = results.find(base.case, "lolcats")
        if base.implementation.startswith("lolcats@") and ours is not None:
            times = duration(base.median_s), duration(ours.median_s)
            steady = base.steady and ours.steady
            ratio = f"{base.median_s / ours.median_s:.2f}{'' if steady else ', unsteady'}"
            rows.append((base.case, base.implementation, *times, ratio))
    return rows


def published_rows(results: Results) -> list[tuple[str, ...]]:
    """Of every published shape that was measured: their times, and those of the same run."""

    def measured(case: Case, name: str) -> str:
        row = results.find(str(case), name)
        return "" if row is None else f"{1e3 * row.median_s:.3f}"

    rows = []
    for (shape, pass_), case in PUBLISHED.items():
        hybrid = PUBLISHED_HYBRID[shape, pass_]
        here = measured(case, "lolcats"), measured(hybrid, "lolcats"), measured(case, "fla")
        if any(here):
            theirs = (f"{ms:.3f}" for ms in published.MILLISECONDS[shape][pass_])
            rows.append((", ".join(map(str, shape)), pass_, *theirs, *here))
    return rows


def model_rows(results: Results) -> list[tuple[str, ...]]:
    """Of our rows that ``gpu_model.interval`` knows: from and to, measured, and where that lies.

    The model is of hybrid attention in bf16 with f = w = 64, V = D and as many key/value heads as
    query heads; a pass of two is the sum of both.
    """
    rows = []
    for row in results.rows:
        shape = row.op, row.dtype, row.f, row.window, row.V, row.Hk
        if row.implementation != "lolcats" or shape != (
            "hybrid_attention", "bfloat16", 64, 64, row.D, row.H
        ):  # fmt: skip
            continue
        size = {"rows": row.B * row.H, "tokens": row.T}
        parts = [interval(row.isa, p, "sliding", row.D, **size) for p in row.pass_.split("+")]
        if None in parts:
            continue
        low, high = sum(part.low for part in parts), sum(part.high for part in parts)
        where = "inside"
        if row.median_s > high:
            where = f"{row.median_s / high:.2f} x its end"
        elif row.median_s < low:
            where = f"{row.median_s / low:.2f} x its start"
        times = f"{duration(low)} - {duration(high)}", duration(row.median_s)
        rows.append((row.case, row.isa, *times, where))
    return rows


def unsteady(results: Results) -> str | None:
    """A warning if rows took longer in some turns than in others, or torch.mm in some cases:
    something else used the machine."""
    alike: dict[tuple[object, ...], list[float]] = {}
    for row in results.rows:
        key = row.isa == "avx2", row.dtype, row.threads
        alike.setdefault(key, []).append(row.mm_gflops_per_s)
    slow, fast = max(((min(x), max(x)) for x in alike.values()), key=lambda x: x[1] / x[0])
    restless = sum(not row.steady for row in results.rows)
    seen = []
    if fast >= STEADY * slow:
        seen.append(
            f"torch.mm ran at {slow:.0f} to {fast:.0f} GFLOP/s, so numbers of different cases do "
            "not compare"
        )
    if restless:
        seen.append(
            f"{restless} of {len(results.rows)} rows took {UNSTEADY} times as long or longer in a "
            "fifth of their samples as in another fifth"
        )
    if not seen:
        return None
    return f"The machine was not steady: {'; '.join(seen)}. Run this again while nothing else runs."


def write_page(results: Results, folder: Path) -> Path:
    """bench.md in ``folder``, which shows the plots that are there."""
    path = folder / "bench.md"
    path.write_text("\n\n".join(["# Microbenchmarks", *sections(results, folder)]) + "\n")
    return path


def sections(results: Results, folder: Path) -> list[str]:
    """What a page says of a run, the plots in ``folder`` among it."""
    parts = _about(results)
    judged = verdicts(results)
    if judged:
        parts += ["## Bars", table(BAR_HEAD, [bar_row(v) for v in judged])]
    if beside := published_rows(results):
        parts += ["## Beside published times", PUBLISHED_ABOUT, table(PUBLISHED_HEAD, beside)]
    if against := base_rows(results):
        parts += ["## Against other commits", table(BASE_HEAD, against)]
    for name, title in PLOTS.items():
        if (folder / name).exists():
            parts += [f"## {title}", f"![{title}]({name})"]
    parts += ["## All rows", _rows(results.rows)]
    if results.skips:
        skips = [(s.case, s.implementation, s.reason) for s in results.skips]
        parts += ["## Not run", table(("case", "implementation", "why"), skips)]
    return parts


def bar_row(verdict: Verdict) -> tuple[str, str, str, str]:
    """Claim, bar, measured, result."""
    bar = verdict.bar
    measured = "" if verdict.value is None else bar.show(verdict.value)
    return bar.claim, bar.limit, measured, verdict.result


def _about(results: Results) -> list[str]:
    if not results.rows:
        return [f"`{results.command}` measured nothing."]
    row = results.rows[0]
    threads = max(r.threads for r in results.rows)
    run = (
        f"`{results.command}` on {row.machine}, {threads} threads, {row.device}: "
        f"lolcats_ops {row.lolcats_ops} ({results.commit}), torch {row.torch}, Python {row.python}."
    )
    warnings = [unsteady(results)]
    if results.interrupted:
        warnings.append("The run was interrupted: cases are missing that were asked for.")
    ceilings = CEILINGS[results.device]
    method = METHOD.format(
        turns=TURNS[results.device],
        size=ceilings.mm_size,
        copy=ceilings.copy_bytes >> 20,
        more=MORE[results.device],
    )
    return [run, method, *(f"**{warning}**" for warning in warnings if warning)]


def _rows(rows: list[Row]) -> str:
    head = ("case", "implementation", "isa", "threads", "samples", "median", "p20 - p80")
    head += ("GFLOP/s", "GB/s", "of ceiling", "extra memory")
    return table(
        head,
        [
            (
                r.case,
                r.implementation,
                r.isa,
                str(r.threads),
                str(r.samples),
                duration(r.median_s),
                f"{duration(r.p20_s)} - {duration(r.p80_s)}",
                f"{r.gflops_per_s:.1f}",
                f"{r.gbytes_per_s:.1f}",
                f"{r.ceiling_fraction:.2f}",
                "" if r.extra_bytes is None else f"{r.extra_bytes / 2**20:.2f} MiB",
            )
            for r in rows
        ],
    )


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Rows in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in x) + " |" for x in lines
    )
