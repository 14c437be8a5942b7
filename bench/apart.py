"""Cases on a device whose processes they may crash: one implementation at a time (see isolated)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from .cases import Case
from .isolated import Channel, serve, work_through
from .results import Row, Skip


def run_apart(
    cases: Sequence[Case],
    names: Sequence[str],
    device: str,
    *,
    budget_s: float,
    log: Path,
    timeout_s: float,
    on_start: Callable[[str], None] = lambda name: None,
) -> Iterator[Row | Skip]:
    """As ``run.run_cases``, but what crashes or hangs is a Skip with its error."""
    items = [
        {"case": asdict(replace(case, peers=())), "implementation": name}
        for case, name in runs(cases, names)
    ]
    outcomes = work_through(
        [sys.executable, "-m", "bench.apart"],
        items,
        settings={"device": device, "budget_s": budget_s},
        environment={"TRITON_INTERPRET": "0"} if device == "cuda" else None,
        log=log,
        timeout_s=timeout_s,
        on_start=lambda item: on_start(f"{Case(**item['case'])} {item['implementation']}"),
    )
    for outcome in outcomes:
        if outcome.error:
            case, name = str(Case(**outcome.item["case"])), outcome.item["implementation"]
            yield Skip(case, name, outcome.error)
        else:
            yield from (Row(**row) for row in outcome.value["rows"])
            yield from (Skip(**skip) for skip in outcome.value["skips"])


def runs(cases: Sequence[Case], names: Sequence[str]) -> list[tuple[Case, str]]:
    """Every case with each of its implementations: ours and its peers, or the named ones."""
    return [(case, name) for case in cases for name in (names or ("lolcats", *case.peers))]


def main() -> None:
    """The child: measures one implementation of a case after the other."""
    channel = Channel()
    import torch

    from .device import synchronize
    from .measure import keep_freed_memory
    from .run import Agreed, run_together

    keep_freed_memory()
    device, budget_s = channel.settings["device"], channel.settings["budget_s"]
    agreed = Agreed()
    current: Case | None = None

    def measure(item: dict[str, Any]) -> dict[str, Any]:
        nonlocal agreed, current
        case = Case(**{**item["case"], "peers": ()})
        if case != current:
            agreed, current = Agreed(), case
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()  # of the implementation before, for the extra bytes of this
        rows, skips = run_together(
            {case: [item["implementation"]]}, device=device, budget_s=budget_s, agreed=agreed
        )
        return {"rows": list(map(asdict, rows)), "skips": list(map(asdict, skips))}

    serve(channel, measure, partial(synchronize, device))


if __name__ == "__main__":
    main()
