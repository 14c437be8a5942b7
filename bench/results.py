"""The one table of results: a row per implementation and case, as CSV and JSON."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

UNSTEADY = 1.5  # of a row, p80 / p20; up to 1.4 where nothing else ran


@dataclass(frozen=True)
class Row:
    """What one implementation needed for one case, and on what."""

    case: str
    implementation: str
    op: str
    pass_: str
    B: int
    H: int
    Hk: int
    T: int
    D: int
    V: int
    f: int
    window: int
    dtype: str
    device: str
    isa: str  # of our kernels, or of torch's
    threads: int
    flops: int  # useful ones, see cases.py; the same for every implementation
    bytes: int
    samples: int  # CPU: turns, each the median of its calls; GPU: calls
    min_s: float
    p20_s: float
    median_s: float
    p80_s: float
    gflops_per_s: float
    gbytes_per_s: float
    # torch.mm of CEILINGS (device.py) between the samples of this case, on as many threads; of bf16
    # where the case and the CPU are, else of fp32
    mm_gflops_per_s: float
    copy_gbytes_per_s: float  # bytes read and written by a copy beyond the caches, likewise
    ceiling_fraction: float  # of what the roofline of these two allows
    extra_bytes: int | None  # peak memory beyond inputs and outputs, where the system tells
    lolcats_ops: str
    torch: str
    python: str
    machine: str

    @property
    def steady(self) -> bool:
        """Whether it took about as long in all of its turns."""
        return self.p80_s < UNSTEADY * self.p20_s


@dataclass(frozen=True)
class Skip:
    """A case that an implementation did not run."""

    case: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class Results:
    """Everything one run found."""

    command: str
    commit: str  # of the checkout, "-dirty" with changes
    rows: list[Row]
    skips: list[Skip]
    device: str = "cpu"
    interrupted: bool = False  # cases are missing that were asked for

    def find(self, case: str, implementation: str) -> Row | None:
        """The row of an implementation in a case."""
        found = (r for r in self.rows if (r.case, r.implementation) == (case, implementation))
        return next(found, None)

    def save(self, folder: Path) -> None:
        """results.json, and the rows alone as results.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        with (folder / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)

    @classmethod
    def load(cls, folder: Path) -> Results:
        """What ``save`` wrote."""
        saved = json.loads((folder / "results.json").read_text())
        rows = [Row(**row) for row in saved["rows"]]
        skips = [Skip(**skip) for skip in saved["skips"]]
        return cls(**{**saved, "rows": rows, "skips": skips})
