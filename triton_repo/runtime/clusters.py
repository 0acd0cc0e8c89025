"""Where a text may be cut while more of it is to come: not inside a Hangul syllable or an emoji.

After the rules for grapheme clusters of Unicode Standard Annex 29, as far as they concern Hangul syllables
(also those of single jamo), emoji with modifiers, variation selectors, joiners and tags, keycaps and flags.
Other clusters, such as letters with combining accents, may be cut: nothing shows wrongly when the rest
arrives.
"""

from __future__ import annotations

import unicodedata

# No emoji has more than a dozen code points; what is longer is no text worth waiting for.
LONGEST = 64
_JOINER = "\u200d"
_KEYCAP_BASES = frozenset("0123456789#*")
# Blocks that hold every Extended_Pictographic character, and some that are not: those only wait a little.
_PICTOGRAPHIC = (
    (0xA9, 0xA9),
    (0xAE, 0xAE),
    (0x203C, 0x203C),
    (0x2049, 0x2049),
    (0x2122, 0x2122),
    (0x2139, 0x2139),
    (0x2190, 0x2BFF),
    (0x3030, 0x303D),
    (0x3297, 0x3299),
    (0x1F000, 0x1F1E5),
    (0x1F200, 0x1F3FA),
    (0x1F400, 0x1FFFD),
)


def settled(text: str) -> int:
    """How many characters of `text` belong to clusters that nothing after it can change.

    `text` starts where a cluster does. At most LONGEST characters are kept waiting.
    """
    end = len(text)
    if not end or (text[-1] < "\x7f" and text[-1] not in _KEYCAP_BASES):
        return end
    base = end - 1
    while base >= 0 and _extends(text[base]):
        base -= 1
    if base < 0:
        return end
    start = _start(text, base)
    return end if start is None or end - start > LONGEST else start


def _start(text: str, base: int) -> int | None:
    """Where the cluster of `text[base]` starts, None when it is of a kind that may be cut."""
    character = text[base]
    code = ord(character)
    if character in _KEYCAP_BASES:
        return base
    if code < 0xA9:
        return None
    if 0x1F1E6 <= code <= 0x1F1FF:
        run = base
        while run > 0 and 0x1F1E6 <= ord(text[run - 1]) <= 0x1F1FF:
            run -= 1
        # Flags are pairs, counted from the first letter.
        return base - (base - run) % 2
    if _hangul(code):
        while base > 0 and _joins(_hangul(ord(text[base - 1])), _hangul(ord(text[base]))):
            base -= 1
        return base
    return _emoji_start(text, base) if _pictographic(code) else None


def _emoji_start(text: str, base: int) -> int:
    """The first of the pictures that joiners bind to the one at `base`."""
    while base > 1 and text[base - 1] == _JOINER:
        before = base - 2
        while before >= 0 and _extends(text[before]):
            before -= 1
        if before < 0 or not _pictographic(ord(text[before])):
            break
        base = before
    return base


def _extends(character: str) -> bool:
    """Whether a character belongs to the one before: marks, joiners, skin tones, tags, variations."""
    code = ord(character)
    if code < 0x300:
        return False
    return (
        unicodedata.category(character) in ("Mn", "Me", "Mc")
        or code in (0x200C, 0x200D, 0xFF9E, 0xFF9F)
        or 0x1F3FB <= code <= 0x1F3FF
        or 0xE0020 <= code <= 0xE007F
    )


def _pictographic(code: int) -> bool:
    return any(first <= code <= last for first, last in _PICTOGRAPHIC)


def _hangul(code: int) -> str:
    """Leading consonant L, vowel V, trailing consonant T, syllable LV or LVT, "" for what is no Hangul."""
    if 0xAC00 <= code <= 0xD7A3:
        return "LVT" if (code - 0xAC00) % 28 else "LV"
    if 0x1100 <= code <= 0x115F or 0xA960 <= code <= 0xA97C:
        return "L"
    if 0x1160 <= code <= 0x11A7 or 0xD7B0 <= code <= 0xD7C6:
        return "V"
    if 0x11A8 <= code <= 0x11FF or 0xD7CB <= code <= 0xD7FB:
        return "T"
    return ""


def _joins(first: str, second: str) -> bool:
    """Rules GB6 to GB8."""
    if first == "L":
        return second in ("L", "V", "LV", "LVT")
    if first in ("V", "LV"):
        return second in ("V", "T")
    return first in ("T", "LVT") and second == "T"
