"""The page of a run: the bars first, then every row, in Markdown."""

from __future__ import annotations

from pathlib import Path

from .bars import BARS, Verdict, judge
from .results import Results, Row

PLOTS = {
    "time.png": "Time against T",
    "decode.png": "Decoding against the context",
    "roofline.png": "Roofline",
}
BAR_HEAD = ("claim", "bar", "measured", "result")
BASE_HEAD = ("case", "commit", "its time", "this one's", "times faster")
STEADY = 1.25  # torch.mm of an idle machine varies by a tenth
METHOD = """\
The implementations of a case run in turns (A B C A B C ...), with torch.mm and a copy among them;
times are medians of their samples. Before any timing, each is compared with the fp64 reference on a
short version of the case, and with the others at full size. GFLOP/s counts useful FLOPs: what the
formula needs, the same for all, nothing for masked tiles. The ceiling of a case is what the
roofline of torch.mm (fp32, 2048^3) and the copy (256 MB, bytes read and written) allows; for rows
on AVX2, with the torch.mm of a process that has ATEN_CPU_CAPABILITY=avx2 and
MKL_ENABLE_INSTRUCTIONS=AVX2. Freed memory stays with the process, so that calls do not begin with
page faults. Extra memory is the peak of one call beyond its inputs and outputs."""


def verdicts(results: Results) -> list[Verdict]:
    """Of every bar whose quantities this run measured, or says why it did not."""
    known = {(x.case, x.implementation) for x in (*results.rows, *results.skips)}
    return [
        judge(bar, results)
        for bar in BARS
        if {(str(q.case), q.implementation) for q in bar.over + bar.under} <= known
    ]


def base_rows(results: Results) -> list[tuple[str, str, str, str, str]]:
    """Case, other commit, its time, ours, and how many times faster ours is."""
    rows = []
    for base in results.rows:
        ours = results.find(base.case, "lolcats")
        if base.implementation.startswith("lolcats@") and ours is not None:
            times = duration(base.median_s), duration(ours.median_s)
            ratio = f"{base.median_s / ours.median_s:.2f}"
            rows.append((base.case, base.implementation, *times, ratio))
    return rows


def unsteady(results: Results) -> str | None:
    """A warning if torch.mm was not equally fast in all cases: something else used the machine."""
    by_threads: dict[tuple[int, str], list[float]] = {}
    for row in results.rows:
        by_threads.setdefault((row.threads, row.isa), []).append(row.mm_gflops_per_s)
    slow, fast = max(((min(x), max(x)) for x in by_threads.values()), key=lambda x: x[1] / x[0])
    if fast < STEADY * slow:
        return None
    return (
        f"The machine was not steady: torch.mm ran at {slow:.0f} to {fast:.0f} GFLOP/s. Numbers of "
        "different cases do not compare; run this again while nothing else runs."
    )


def write_page(results: Results, folder: Path) -> Path:
    """bench.md in ``folder``, which shows the plots that are there."""
    parts = ["# Microbenchmarks", *_about(results)]
    judged = verdicts(results)
    if judged:
        parts += [
            "## Bars",
            _table(BAR_HEAD, [bar_row(v) for v in judged]),
        ]
    if against := base_rows(results):
        parts += ["## Against other commits", _table(BASE_HEAD, against)]
    for name, title in PLOTS.items():
        if (folder / name).exists():
            parts += [f"## {title}", f"![{title}]({name})"]
    parts += ["## All rows", _rows(results.rows)]
    if results.skips:
        skips = [(s.case, s.implementation, s.reason) for s in results.skips]
        parts += ["## Not run", _table(("case", "implementation", "why"), skips)]
    path = folder / "bench.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


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
    warning = unsteady(results)
    return [run, METHOD, *([f"**{warning}**"] if warning else [])]


def _rows(rows: list[Row]) -> str:
    head = ("case", "implementation", "isa", "threads", "samples", "median", "p20 - p80")
    head += ("GFLOP/s", "GB/s", "of ceiling", "extra memory")
    return _table(
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


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in x) + " |" for x in lines
    )
