"""The standard set under pytest-benchmark, which knows how to compare and keep its own files:

    pytest bench -k "T2048 and forward" --benchmark-json=before.json

The tables of ``make bench`` are not made from these: pytest-benchmark times one implementation
after the other, ``python -m bench`` in turns.
"""

import pytest
import torch

from .apart import runs
from .calls import use_isa
from .cases import STANDARD
from .measure import keep_freed_memory
from .peers import find
from .remote import Refused
from .run import prepare, restored

RUNS = runs(STANDARD, ())


@pytest.mark.parametrize(("case", "name"), RUNS, ids=[f"{case}-{name}" for case, name in RUNS])
def test_time(case, name, benchmark) -> None:
    keep_freed_memory()
    with restored():
        try:
            entry = prepare(name, case)
        except Refused as refused:
            pytest.skip(str(refused))
        benchmark.group = str(case)
        benchmark.extra_info |= {"isa": entry.isa, "flops": case.flops, "bytes": case.bytes}
        torch.set_num_threads(find(name).threads or torch.get_num_threads())
        use_isa(find(name).isa)
        benchmark(entry.timer.call)
