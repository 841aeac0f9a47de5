"""CaseOps written out character by character, as it is specified: slow, and what the fast one must equal."""

from __future__ import annotations

TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
UPPER, LOWER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"


def encode_word(word: str) -> str:
    """One longest run of ASCII letters."""
    capitals = [char in UPPER for char in word]
    if not any(capitals):
        return word
    if len(word) >= 2 and all(capitals):
        return ALLCAPS + word.lower()
    if capitals[0] and not any(capitals[1:]):
        return TITLE + word.lower()
    marks = [TITLE if capitals[0] else "", *[CAPNEXT if capital else "" for capital in capitals[1:]]]
    return "".join(mark + char.lower() for mark, char in zip(marks, word, strict=True))


def encode(text: str) -> str:
    """The whole text, left to right."""
    out, start = [], 0
    while start < len(text):
        stop = start
        while stop < len(text) and text[stop] in UPPER + LOWER:
            stop += 1
        if stop > start:
            out.append(encode_word(text[start:stop]))
        else:
            out.append(ESC + text[start] if TITLE <= text[start] <= ESC else text[start])
        start = max(stop, start + 1)
    return "".join(out)


def decode(text: str) -> str | None:
    """The decoder's state machine, one character per step; None where the string is malformed."""
    out = ""
    escape = capital = in_word = all_caps = False
    mode = ""
    for char in text:
        letter = char in UPPER + LOWER
        if escape:
            if mode:
                return None
            out, escape, in_word, all_caps = out + char, False, letter, all_caps and letter
        elif char == ESC:
            escape = True
        elif char == CAPNEXT:
            if capital:
                return None
            capital = True
        elif char in (TITLE, ALLCAPS):
            if mode or capital or in_word:
                return None
            mode = char
        elif not letter:
            if mode or capital:
                return None
            out, in_word, all_caps = out + char, False, False
        else:
            if not in_word:
                all_caps = mode == ALLCAPS
            out += char.upper() if all_caps or capital or (mode == TITLE and not in_word) else char
            mode, capital, in_word = "", False, True
    return None if escape or mode or capital else out


def original_bytes(encoded: str) -> list[int]:
    """Original UTF-8 bytes per character of encoded text."""
    counts, escape = [], False
    for char in encoded:
        operator = TITLE <= char <= ESC and not escape
        counts.append(0 if operator else len(char.encode("utf-8", "surrogatepass")))
        escape = operator and char == ESC
    return counts


def piece_bytes(encoded: str, spans: list[tuple[int, int]]) -> list[int]:
    """Original bytes of pieces whose surfaces are encoded[begin:end]."""
    counts = original_bytes(encoded)
    return [sum(counts[begin:end]) for begin, end in spans]
