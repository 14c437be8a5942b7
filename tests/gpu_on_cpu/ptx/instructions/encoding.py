"""What a rule says of an instruction, and the register of rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import NotSupported, PtxError
from ..parser import Statement


@dataclass(frozen=True)
class Typed:
    """An operand as it is written, and the type to read it as.

    "any b16": a register of any width, or a constant of that type; "address": a base address.
    """

    text: str
    type: str


@dataclass(frozen=True)
class Encoding:
    """An operation of the machine and its operands."""

    operation: str
    destinations: tuple[Typed, ...] = ()
    sources: tuple[Typed, ...] = ()
    immediates: tuple[int, ...] = ()
    target: str = ""  # the label that immediate 0 stands for


Rule = Callable[[Statement], Encoding]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def encode(statement: Statement) -> Encoding:
    """What the machine has to do for a statement."""
    name = statement.parts[0]
    if name not in RULES:
        reason = REASONS.get(name, "")
        raise NotSupported(f"{statement}{reason}")
    try:
        return RULES[name](statement)
    except (ValueError, IndexError, KeyError) as error:
        raise PtxError(f"not understood: {statement}") from error


REASONS = {
    "mbarrier": ": kernels with tensor descriptors (TMA, mbarrier) do not run here",
    "call": ": calls of device functions (printf, assert) do not run here",
    "tcgen05": ": sm_100's tensor core does not run here",
}


def modifiers_of(statement: Statement, ignored: Iterable[str] = ()) -> list[str]:
    """The opcode without its name and without what changes nothing."""
    return [part for part in statement.parts[1:] if part not in ignored]


def typed(texts: Iterable[str], type: str) -> tuple[Typed, ...]:
    return tuple(Typed(text, type) for text in texts)


def unsigned(type: str) -> str:
    """The machine's name of a type whose signedness does not matter."""
    return "u" + type[1:] if re.fullmatch(r"[bus]\d+", type) else type
