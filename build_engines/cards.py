"""The catalogue of 16 GB cards, and custom cards by memory and compute capability.

`memory_mib` is what the driver reports as the card's total (`nvidia-smi`), not the 16,384 MiB on the box:
what the firmware keeps and (on the T4, whose ECC is on) the check bits are already taken off. What the plan
may use is this total less the stack file's `reserve_mib`, which covers the driver's own share and a desktop.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024

# TensorRT-RTX compiles ahead of time for these and for no others (its ComputeCapability enumeration).
RTX_COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
# Its default set ("portable"), compiled for several generations at once, runs from here on.
PORTABLE_FROM = (8, 0)
# What an NVIDIA GPU that TensorRT still supports can report: anything else is a typing mistake.
KNOWN_COMPUTE_CAPABILITIES = (
    *("7.5", "8.0", "8.6", "8.7", "8.9"),
    *("9.0", "10.0", "10.3", "11.0", "12.0", "12.1"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU model. `memory_mib`: total as the driver reports it; `compute_capability`: "major.minor"."""

    name: str
    title: str
    memory_mib: int
    compute_capability: str

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * MIB


def capability_at_least(compute_capability: str, least: tuple[int, int]) -> bool:
    """Whether "major.minor" is `least` or newer."""
    major, _, minor = compute_capability.partition(".")
    return (int(major), int(minor)) >= least


def _card(name: str, title: str, memory_mib: int, compute_capability: str) -> Card:
    return Card(name=name, title=title, memory_mib=memory_mib, compute_capability=compute_capability)


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("rtx-5070-ti", "GeForce RTX 5070 Ti", 16_303, "12.0"),
        _card("rtx-5060-ti", "GeForce RTX 5060 Ti 16 GB", 16_311, "12.0"),
        _card("rtx-4080", "GeForce RTX 4080", 16_376, "8.9"),
        _card("rtx-4060-ti", "GeForce RTX 4060 Ti 16 GB", 16_380, "8.9"),
        _card("rtx-a4000", "RTX A4000", 16_376, "8.6"),
        _card("t4", "Tesla T4", 15_360, "7.5"),
    )
}


def custom_card(memory_mib: int, compute_capability: str) -> Card:
    """A card that is not in the catalogue; the stack file has checked both values."""
    name = f"custom-{memory_mib}mib-sm{compute_capability.replace('.', '')}"
    return _card(name, f"custom card, {memory_mib:,} MiB", memory_mib, compute_capability)
