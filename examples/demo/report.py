"""The demo's numbers: bars, the printed table, report.json and report.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

RECOVERED = 0.985  # share of the perplexity lost by swapping that both stages win back
ABOVE_SOFTMAX = 1.15  # stage 2 against softmax with the same LoRA steps
SMALLER = 16  # cache at the longest context
FLAT = 1.10  # decode speed, fastest context against slowest
LINEAR = 1.15  # stage 1 memory per token, long against short


class Row(NamedTuple):
    """One measure; `met` is None where there is no bar."""

    measure: str
    value: str
    bar: str = ""
    met: bool | None = None


def rows(report: dict[str, Any]) -> list[Row]:
    """The table of report.json's measures against their bars."""
    ppl = report["perplexity"]
    recovered = (ppl["swapped"] - ppl["stage2"]) / (ppl["swapped"] - ppl["softmax_lora"])
    ratio = ppl["stage2"] / ppl["softmax_lora"]
    parameters = report["trainable_parameters"]
    trained = parameters["stage1"] + parameters["stage2"]
    cache, decode, prefill = (
        report[k] for k in ("cache_bytes", "decode_tokens_per_s", "prefill_s")
    )
    contexts = list(cache["hybrid"])
    last = contexts[-1]
    smaller = cache["softmax"][last] / cache["hybrid"][last]
    speeds = decode["hybrid"].values()
    flat = max(speeds) / min(speeds)
    table = [
        *(Row(f"perplexity, {_NAMES[name]}", f"{value:.2f}") for name, value in ppl.items()),
        Row(
            "recovered: (swapped - stage 2) / (swapped - softmax + LoRA)",
            f"{recovered:.4f}",
            f">= {RECOVERED}",
            recovered >= RECOVERED,
        ),
        Row(
            "stage 2 / softmax + LoRA",
            f"{ratio:.3f}",
            f"<= {ABOVE_SOFTMAX}",
            ratio <= ABOVE_SOFTMAX,
        ),
        Row(
            "trained parameters, both stages",
            f"{trained:,} ({trained / parameters['model']:.2%} of the model)",
        ),
        *(
            Row(
                f"cache at {c} tokens, hybrid / softmax",
                f"{_mb(cache['hybrid'][c])} / {_mb(cache['softmax'][c])}",
            )
            for c in contexts
        ),
        Row(
            "cache constant",
            "yes" if len(set(cache["hybrid"].values())) == 1 else "no",
            "yes",
            len(set(cache["hybrid"].values())) == 1,
        ),
        Row(
            f"cache smaller at {last} tokens",
            f"{smaller:.1f}x",
            f">= {SMALLER}x",
            smaller >= SMALLER,
        ),
        *(
            Row(
                f"decode at {c} tokens, hybrid / softmax",
                f"{decode['hybrid'][c]:.1f} / {decode['softmax'][c]:.1f} tokens/s",
            )
            for c in contexts
        ),
        Row("decode flat: fastest / slowest context", f"{flat:.3f}", f"<= {FLAT}", flat <= FLAT),
        Row("decode crossover", report["decode_crossover"]),
        *(
            Row(
                f"prefill of {c} tokens, hybrid / softmax",
                f"{prefill['hybrid'][c]:.1f} / {prefill['softmax'][c]:.1f} s"
                f" ({prefill['softmax'][c] / prefill['hybrid'][c]:.2f}x)",
            )
            for c in prefill["hybrid"]
        ),
    ]
    peaks = report["stage1_peak_bytes"]
    if all(peaks.values()):
        (short, few), *_, (long, many) = peaks.items()
        growth = many / few / (int(long) / int(short))
        table.append(
            Row(
                f"stage 1 memory at {short} / {long} tokens",
                f"{_mb(few)} / {_mb(many)}",
                f"linear: <= {LINEAR} per token",
                growth <= LINEAR,
            )
        )
    return table


_NAMES = {
    "softmax": "original",
    "swapped": "attention swapped",
    "stage1": "after stage 1",
    "stage2": "after stage 2",
    "softmax_lora": "original with the same LoRA steps",
}


def show(table: list[Row]) -> None:
    """Prints the table."""
    printed = Table(title="lolcats demo", title_justify="left")
    for column in ("measure", "value", "bar", ""):
        printed.add_column(column)
    for row in table:
        printed.add_row(row.measure, row.value, row.bar, _verdict(row.met))
    Console(width=140).print(printed)


def write(
    out: Path, report: dict[str, Any], table: list[Row], samples: dict[str, str], prompt: str
) -> None:
    """report.json and report.md."""
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = ["# lolcats demo", "", "| measure | value | bar | met |", "|---|---|---|---|"]
    lines += [f"| {r.measure} | {r.value} | {r.bar} | {_verdict(r.met)} |" for r in table]
    lines += [
        "",
        "Printed by `make demo` on "
        + ", ".join(f"{k} {v}" for k, v in report["machine"].items())
        + "; ",
    ]
    lines[-1] += ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + "."
    lines += [
        "",
        "![perplexity](perplexity.png)",
        "![losses](losses.png)",
        "![context](context.png)",
    ]
    lines += ["", f"Prompt: {prompt}"]
    for name, text in samples.items():
        lines += ["", f"**{name}**", "", *(f"> {line}" for line in text.splitlines())]
    lines += ["", "| phase | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.0f} |" for name, seconds in report["seconds"].items()]
    (out / "report.md").write_text("\n".join(lines) + "\n")


def _verdict(met: bool | None) -> str:
    return {None: "", True: "met", False: "MISSED"}[met]


def _mb(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
