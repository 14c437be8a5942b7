"""Finds accesses of two programs to the same memory that nothing orders.

Two programs that touch the same memory, one of them with a store, must be ordered by atomics, since
nothing else orders the programs of a launch. Order is "happens before" of the GPU's memory model:
what a program did before a release on an address comes before what another does after an acquire
on it, if the acquire came later. The interpreter runs programs one after another, so one run sees
every pair of conflicting accesses of that run.

The bookkeeping is that of FastTrack (Flanagan and Freund, 2009) on NumPy arrays. Programs count
epochs, from 1; a release ends one. A history says up to which epoch each program did something, as
a vector over programs. Arrays hold, for each piece of memory, the numbers of its histories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

_NOBODY = 0  # the history in which no program did anything
_ALL = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Conflict:
    """An earlier access that is not ordered before the present one."""

    address: int
    program: int
    access: str


class _Region:
    """Arguments that overlap in memory, in pieces of their smallest element."""

    def __init__(self, first: int, end: int, piece: int) -> None:
        self.first, self.piece = first, piece
        pieces = -(-(end - first) // piece)
        self.stores, self.loads, self.atomics, self.releases = (
            np.full(pieces, _NOBODY, np.int32) for _ in range(4)
        )

    def pieces(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Indices of what the accesses touch; one narrower than a piece counts as the piece."""
        index = (addresses.reshape(-1).astype(np.int64) - self.first) // self.piece
        if size <= self.piece:
            return index
        return (index[:, None] + np.arange(size // self.piece)).reshape(-1)


def _merged(spans: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(first, end, element) of memory; those that overlap become one."""
    merged: list[tuple[int, int, int]] = []
    for first, end, element in sorted(span for span in spans if span[0] < span[1]):
        if merged and first < merged[-1][1]:
            start, last, smallest = merged[-1]
            merged[-1] = (start, max(last, end), min(smallest, element))
        else:
            merged.append((first, end, element))
    return merged


class RaceDetector:
    """Follows the accesses of a launch's programs; each method answers the first conflict."""

    def __init__(self, spans: Iterable[tuple[int, int, int]], programs: int) -> None:
        merged = _merged(spans)
        self._regions = [_Region(*span) for span in merged]
        self._firsts = np.array([first for first, _, _ in merged], np.int64)
        self._histories = [np.zeros(programs, np.int32)]
        self._numbers: dict[tuple[int, int, int], int] = {}

    def start(self, program: int) -> None:
        """From here on, accesses are this program's."""
        self._program = program
        self._epoch = 1
        self._known = self._histories[_NOBODY].copy()  # epochs that come before what follows
        self._known[program] = _ALL

    def load(self, addresses: np.ndarray, size: int) -> Conflict | None:
        for region, pieces in self._touched(addresses, size):
            if conflict := self._conflict(region, pieces, "stores", "atomics"):
                return conflict
            self._note(region.loads, pieces)
        return None

    def store(self, addresses: np.ndarray, size: int) -> Conflict | None:
        for region, pieces in self._touched(addresses, size):
            if conflict := self._conflict(region, pieces, "stores", "atomics", "loads"):
                return conflict
            # Whoever is ordered after this store is ordered after the stores before it.
            region.stores[pieces] = self._with_this_program(_NOBODY)
        return None

    def atomic(
        self, addresses: np.ndarray, size: int, acquires: bool, releases: bool
    ) -> Conflict | None:
        touched = list(self._touched(addresses, size))
        for region, pieces in touched:
            for history in _unique(region.releases[pieces]) if acquires else ():
                np.maximum(self._known, self._histories[history], out=self._known)
            if conflict := self._conflict(region, pieces, "stores", "loads"):
                return conflict
            self._note(region.atomics, pieces)
        if releases:
            published = self._known.copy()
            published[self._program] = self._epoch
            for region, pieces in touched:
                self._replace(region.releases, pieces, lambda h: self._joined(h, published))
            self._epoch += 1
        return None

    def _touched(self, addresses: np.ndarray, size: int):
        """Regions, each with the indices of the pieces that are accessed."""
        regions = np.searchsorted(self._firsts, addresses.reshape(-1).astype(np.int64), "right") - 1
        for number in _unique(regions):
            region = self._regions[number]
            yield region, region.pieces(addresses.reshape(-1)[regions == number], size)

    def _conflict(self, region: _Region, pieces: np.ndarray, *kinds: str) -> Conflict | None:
        for kind in kinds:
            numbers = getattr(region, kind)[pieces]
            for number in _unique(numbers):
                unordered = self._histories[number] > self._known
                if number != _NOBODY and unordered.any():
                    piece = int(pieces[np.argmax(numbers == number)])
                    address = region.first + piece * region.piece
                    return Conflict(address, int(np.argmax(unordered)), kind)
        return None

    def _note(self, numbers: np.ndarray, pieces: np.ndarray) -> None:
        self._replace(numbers, pieces, self._with_this_program)

    def _replace(self, numbers: np.ndarray, pieces: np.ndarray, new: Callable[[int], int]) -> None:
        now = numbers[pieces]
        for number in _unique(now):
            numbers[pieces[now == number]] = new(number)

    def _with_this_program(self, history: int) -> int:
        key = (history, self._program, self._epoch)
        if key not in self._numbers:
            vector = self._histories[history].copy()
            vector[self._program] = self._epoch
            self._numbers[key] = self._add(vector)
        return self._numbers[key]

    def _joined(self, history: int, vector: np.ndarray) -> int:
        return self._add(np.maximum(self._histories[history], vector))

    def _add(self, vector: np.ndarray) -> int:
        self._histories.append(vector)
        return len(self._histories) - 1


def _unique(numbers: np.ndarray) -> list[int]:
    """Distinct values; nearly always there is one, which needs no sorting."""
    first = numbers[0]
    return [int(first)] if (numbers == first).all() else np.unique(numbers).tolist()
