"""Runs cases: check, time in turns, and make rows."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from statistics import median, quantiles
from typing import NamedTuple

import torch

import lolcats_ops as lo
from lolcats_ops import _C

from .calls import Call, WrongResult, bind, check, check_whole, compare
from .cases import Case, in_groups
from .device import CEILINGS, isa, machine
from .inputs import make_inputs
from .isolated import summary
from .measure import LocalTimer, Timer, copy_timer, extra_bytes, mm_timer, sample
from .peers import Peer, find, peers
from .remote import Refused, Server
from .results import Row, Skip

BUDGET_S = 1.0  # of samples, for each implementation of a case
MM, COPY = "torch.mm", "copy"
# torch reads the first once per process; its matrix product asks the second, on Intel CPUs.
ONLY_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

OF_PAIRS = ("amx", "avx512_bf16")  # instruction sets with products of bf16


@dataclass
class Agreed:
    """What implementations of a case should return at full size, by what they compute: some heads
    of a forward pass in fp64; of other passes what the first one returned."""

    heads: dict[str, torch.Tensor] = field(default_factory=dict)
    results: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)


class Ceiling(NamedTuple):
    """The torch.mm and the copy that a row is measured against."""

    dtype: str
    threads: int
    avx2: bool


@dataclass(frozen=True)
class Entry:
    """An implementation, checked and ready to be timed on one case."""

    timer: Timer
    isa: str
    version: str
    extra_bytes: int | None = None


def run_cases(
    cases: Sequence[Case],
    names: Sequence[str] = (),
    *,
    device: str = "cpu",
    budget_s: float = BUDGET_S,
    bases: Mapping[str, Server] | None = None,
    on_cases: Callable[[Sequence[Case]], None] = lambda cases: None,
) -> Iterator[tuple[list[Row], list[Skip]]]:
    """Measures ours and the peers of each case, or the named ones.

    Cases that bars compare take turns, the others follow one another: rows and skips come as they
    are measured.
    """
    selected = {case: tuple(names) or ("lolcats", *case.peers) for case in cases}
    used = {name for entries in selected.values() for name in entries}
    with ExitStack() as stack:
        avx2 = None
        if device == "cpu" and any(find(name).isa == "avx2" for name in used):
            avx2 = stack.enter_context(Server(environment=ONLY_AVX2))
        elsewhere = {}
        if device == "cpu":
            # What torch.compile leaves in a process slows threads that run there afterwards.
            needed = sorted(name for name in used if find(name).compiled)
            if bases and "lolcats" in used:
                needed.append("lolcats")  # what is compared is timed in the same way
            elsewhere = {name: stack.enter_context(Server()) for name in needed}
        for group in in_groups(cases):
            on_cases(group)
            yield run_together(
                {case: selected[case] for case in group},
                device=device,
                budget_s=budget_s,
                bases=bases,
                avx2=avx2,
                elsewhere=elsewhere,
            )


def run_together(
    selected: Mapping[Case, Sequence[str]],
    *,
    device: str = "cpu",
    budget_s: float = BUDGET_S,
    bases: Mapping[str, Server] | None = None,
    avx2: Server | None = None,
    elsewhere: Mapping[str, Server] | None = None,
    agreed: Agreed | None = None,
) -> tuple[list[Row], list[Skip]]:
    """Measures the named implementations of some cases in turns.

    What cannot run a case, or computes something else, is skipped with the reason. ``bases`` are
    other commits of this library, by the name of their rows; ``avx2`` times the ceiling of rows
    that use AVX2; ``elsewhere`` run what does not run in this process, such as what torch.compile
    makes, by the name of the implementation; ``agreed`` are results of earlier calls for the only
    case, and gets those of these.
    """
    entries: dict[tuple[Case, str], Entry] = {}
    skips: list[Skip] = []
    agreed_of = {case: agreed or Agreed() for case in selected}
    servers = {name: (server, "lolcats") for name, server in (bases or {}).items()}
    servers |= {name: (server, name) for name, server in (elsewhere or {}).items()}
    for server, _ in servers.values():
        server.forget()
    with restored():
        wanted = [(case, name) for case, ns in selected.items() for name in (*ns, *(bases or ()))]
        for case, name in wanted:
            try:
                if name in servers:
                    server, there = servers[name]
                    entries[case, name] = Entry(*server.prepare(there, case, device))
                else:
                    entries[case, name] = prepare(name, case, device, agreed_of[case])
            except Refused as refused:
                skips.append(Skip(str(case), name, str(refused)))
        if not entries:
            return [], skips
        timers: dict[object, Timer] = {key: entry.timer for key, entry in entries.items()}
        ceilings = {
            (case, name): _ceiling(case, name, device, avx2 is not None and entry.isa == "avx2")
            for (case, name), entry in entries.items()
        }
        if avx2 is not None:
            avx2.forget()
        for ceiling in dict.fromkeys(ceilings.values()):
            if avx2 is not None and ceiling.avx2:
                product: Timer = avx2.prepare(MM, next(iter(selected)), device, ceiling.threads)[0]
            else:
                product = mm_timer(device, ceiling.dtype, ceiling.threads)
            timers[MM, ceiling] = product
            timers[COPY, ceiling.threads] = copy_timer(device, ceiling.threads)
        samples = sample(timers, budget_s, device)
        rows = []
        for (case, name), entry in entries.items():
            ceiling = ceilings[case, name]
            mm = 1e-9 * CEILINGS[device].flops / median(samples[MM, ceiling])
            copy = 1e-9 * CEILINGS[device].bytes / median(samples[COPY, ceiling.threads])
            seconds = samples[case, name]
            rows.append(_row(case, name, entry, seconds, device, ceiling.threads, mm, copy))
    return rows, skips


def _ceiling(case: Case, name: str, device: str, avx2: bool) -> Ceiling:
    """Of a row: by its threads, and in the number type that its products could be in."""
    peer = peers().get(name)  # None: this library at another commit
    threads = (peer and peer.threads) or torch.get_num_threads()
    of_pairs = case.dtype == "bfloat16" and find("lolcats").isa in OF_PAIRS and not avx2
    dtype = case.dtype if device == "cuda" or of_pairs else "float32"
    return Ceiling(dtype, threads, avx2)


def prepare(
    name: str,
    case: Case,
    device: str = "cpu",
    agreed: Agreed | None = None,
) -> Entry:
    """Checks an implementation and prepares its call. ``agreed``: results of those before it.

    Raises:
        Refused: it cannot run the case, or computes something else.
    """
    peer = find(name)
    if (reason := peer.refusal(case, device)) is not None:
        raise Refused(reason)
    try:
        call = checked_call(peer, case, device, agreed or Agreed())
    except WrongResult as error:
        raise Refused(f"computes something else: {error}") from error
    except Exception as error:  # of a peer that is not ours, too: the other rows go on
        raise Refused(summary(error)) from error
    used = (device == "cpu" and (peer.isa or peer.built_for)) or isa(device)
    timer = LocalTimer(call, isa=peer.isa, threads=peer.threads, device=device)
    return Entry(timer, used, lo.__version__, extra_bytes(call, device))


def checked_call(peer: Peer, case: Case, device: str, agreed: Agreed) -> Call:
    """The call of a peer, after the gate.

    Raises:
        WrongResult: it computes something else.
    """
    check(peer, case, device)
    inputs = make_inputs(case, device)
    call = bind(peer, inputs)
    result = call()
    if case.pass_ == "forward" and case.op != "attention_transfer":
        check_whole(result[0], peer, inputs, agreed.heads)
    elif peer.computes in agreed.results:
        compare(result, agreed.results[peer.computes], case)
    elif peer.compiled:
        trusted = find("sdpa" if peer.computes == "softmax" else "lolcats")
        checked_call(trusted, case, device, agreed)
        compare(result, agreed.results[peer.computes], case)
    else:
        agreed.results[peer.computes] = tuple(x.clone() for x in result)  # a graph writes its own
    return call


def _row(
    case: Case,
    name: str,
    entry: Entry,
    seconds: list[float],
    device: str,
    threads: int,
    mm: float,
    copy: float,
) -> Row:
    p20, _, _, p80 = quantiles(seconds, n=5, method="inclusive")
    middle = median(seconds)
    gflops, gbytes = (1e-9 * work / middle for work in (case.flops, case.bytes))
    shape = {f.name: getattr(case, f.name) for f in fields(case) if f.name != "peers"}
    return Row(
        case=str(case),
        implementation=name,
        **shape,
        threads=threads,
        device=device,
        isa=entry.isa,
        flops=case.flops,
        bytes=case.bytes,
        samples=len(seconds),
        min_s=min(seconds),
        p20_s=p20,
        median_s=middle,
        p80_s=p80,
        gflops_per_s=gflops,
        gbytes_per_s=gbytes,
        mm_gflops_per_s=mm,
        copy_gbytes_per_s=copy,
        # The roofline allows min(mm, flops / bytes * copy).
        ceiling_fraction=max(gflops / mm, gbytes / copy),
        extra_bytes=entry.extra_bytes,
        lolcats_ops=entry.version,
        torch=torch.__version__,
        python=platform.python_version(),
        machine=machine(device),
    )


@contextmanager
def restored() -> Iterator[None]:
    """Afterwards threads and instruction set are what they were."""
    threads, isa = torch.get_num_threads(), _C.cpu_isa()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _C.set_cpu_isa(isa)
