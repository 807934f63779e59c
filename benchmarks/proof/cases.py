"""Which steps are compiled for the table: rule x storage x layout x architecture, and the list that covers their pairs.

Storages that are plain are compiled with every rule. The others, whose code is the codecs' and hardly the rule's, are
compiled with every layout and for every architecture, and every rule comes with some of them; with every rule in the
full product, which is slow.
"""

from __future__ import annotations

from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

from benchmarks.proof.covering import cover
from fasttrain.optim import RULES
from fasttrain.precision.codecs import NUMBER, POSITIVE, STOCHASTIC, codec

LIST = Path(__file__).with_name("covering.txt")
ARCHITECTURES = (80, 90, 100)
BY_NAME = {rule.name: rule for rule in RULES}
PLAIN = ("f32, f32, f32", "bf16, bf16, bf16", "f16, f16, f16", "f64, f64, f64", "bf16, f32, bf16", "f16, f32, f16",
         "bf16, bf16, f32")
# p, g, states (+ S: rounded at random), with the codec of an EMA.
KEPT = {
    "split16, bf16, f32": "f32",
    "split16, bf16, bf16+S": "bf16+S",
    "split16, bf16, int8": "bf16+S",
    "split16, f32, int4": "f32",
    "split8, bf16, int8+S": "f32",
    "split8, bf16, e4m3": "bf16+S",
    "bf16+S, bf16, int8+S": "bf16+S",
    "bf16+S, bf16, e5m2+S": "f16+S",
    "f16+S, f16, f16+S": "f32",
    "master_bf16, bf16, f32": "f32",
    "master_f16, f16, int8": "f16+S",
    "kahan_bf16, bf16, int4+S": "bf16+S",
    "kahan_f16, f16, e4m3+S": "f32",
}
LAYOUTS = {"as it is": (False, False), "clip": (True, False), "EMA": (False, True), "clip and EMA": (True, True)}
PLAINEST = next(iter(LAYOUTS))


class Case(NamedTuple):
    """A step. `layout`: what is done beside it, in one kernel."""

    rule: str
    storage: str
    layout: str
    arch: int

    def __str__(self) -> str:
        return f"step {self.rule}: {self.storage}: {self.layout}: sm_{self.arch}"

    @classmethod
    def parse(cls, text: str) -> Case:
        rule, storage, layout, arch = text.removeprefix("step ").split(": ")
        return cls(rule, storage, layout, int(arch.removeprefix("sm_")))

    @property
    def plain(self) -> bool:
        """Whether the kernel is the one of plain items."""
        return self.storage in PLAIN

    @property
    def clip(self) -> bool:
        return LAYOUTS[self.layout][0]

    @property
    def codecs(self) -> tuple[int, ...]:
        """Of p, g, the states and the EMA."""
        rule, (p, g, state) = BY_NAME[self.rule], self.storage.split(", ")
        states = [f"{state}+P" if name in rule.positive and codec(number(state)).block else state
                  for name in rule.state]
        average = [KEPT[self.storage]] if LAYOUTS[self.layout][1] else []
        return tuple(map(number, (p, g, *states, *average)))


def number(name: str) -> int:
    """Of a codec: its name, with +P for positive, +S for rounded at random."""
    base, *flags = name.split("+")
    return NUMBER[base] + sum({"P": POSITIVE, "S": STOCHASTIC}[flag] for flag in flags)


def covering() -> list[Case]:
    """Every rule with every plain storage, those with every architecture; and every other storage with every layout
    and with every architecture, once with the first rule and else with the others in turn.
    """
    plain = cover({"rule": list(BY_NAME), "storage": PLAIN, "layout": (PLAINEST,), "arch": ARCHITECTURES},
                  [("rule", "storage"), ("rule", "arch"), ("storage", "arch")])
    others = cover({"storage": tuple(KEPT), "layout": tuple(LAYOUTS), "arch": ARCHITECTURES})
    first, *rest = BY_NAME
    once, turn = dict(zip(KEPT, cycle(LAYOUTS), strict=False)), cycle(rest)  # once[storage]: the layout
    return [*(Case(**case) for case in plain),
            *(Case(first if once[case["storage"]] == case["layout"] else next(turn), **case) for case in others)]


@cache
def listed() -> tuple[Case, ...]:
    """The committed list."""
    return tuple(map(Case.parse, LIST.read_text().splitlines()))


def full(rule: str) -> list[Case]:
    """Every case of a rule."""
    return [Case(rule, *rest) for rest in (*product(PLAIN, (PLAINEST,), ARCHITECTURES),
                                           *product(KEPT, LAYOUTS, ARCHITECTURES))]
