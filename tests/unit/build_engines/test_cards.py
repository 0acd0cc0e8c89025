from __future__ import annotations

from build_engines.cards import CARDS, KNOWN_COMPUTE_CAPABILITIES, MIB, RTX_COMPUTE_CAPABILITIES, custom_card


def test_the_catalogue_holds_the_16_gb_cards_with_what_the_driver_reports() -> None:
    assert set(CARDS) == {"rtx-5070-ti", "rtx-5060-ti", "rtx-4080", "rtx-4060-ti", "rtx-a4000", "t4"}
    for name, card in CARDS.items():
        assert card.name == name
        assert 15_000 < card.memory_mib < 16_384
        assert card.compute_capability in RTX_COMPUTE_CAPABILITIES
    assert CARDS["rtx-5070-ti"].compute_capability == "12.0"
    assert CARDS["t4"].compute_capability == "7.5"


def test_a_custom_card_says_what_it_is() -> None:
    card = custom_card(24_564, "8.9")
    assert (card.memory_bytes, card.compute_capability) == (24_564 * MIB, "8.9")
    assert card.name == "custom-24564mib-sm89"
    assert "24,564 MiB" in card.title
    assert card.compute_capability in KNOWN_COMPUTE_CAPABILITIES
