"""Text as it grows: stop strings, and pieces that are safe to show."""

from __future__ import annotations

from typing import Any


class TextStream:
    """The text of one sample as its tokens arrive: stop strings, and pieces that are safe to show.

    A token may end in the middle of a character, and decoding is not additive, so a piece is the difference of two
    decodings that start at the same, recent token.
    """

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...]) -> None:
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        # Text that may yet turn out to begin a stop string is held back.
        self._held = max(map(len, stop_strings), default=1) - 1
        self.text = ""
        self._shown = 0
        self._start = self._read = 0

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def add(self, token_ids: list[int]) -> str | None:
        """Take the newest of all tokens so far; returns the stop string that is now complete, and cuts it off."""
        known = self._decode(token_ids[self._start : self._read])
        text = self._decode(token_ids[self._start :])
        if len(text) <= len(known) or text.endswith("\ufffd"):
            return None
        searched = max(0, len(self.text) - self._held)
        self.text += text[len(known) :]
        self._start, self._read = self._read, len(token_ids)
        found = [(self.text.find(s, searched), s) for s in self._stop_strings]
        first = min(((at, s) for at, s in found if at >= 0), default=None)
        if first is None:
            return None
        self.text = self.text[: first[0]]
        return first[1]

    def finish(self, token_ids: list[int]) -> None:
        """No stop string ended the sample: take in what was held for the rest of a character."""
        whole = self._decode(token_ids)
        if whole.startswith(self.text[: self._shown]):
            self.text = whole

    def piece(self, final: bool) -> str:
        """What can be shown since the last piece."""
        upto = len(self.text) if final else max(self._shown, len(self.text) - self._held)
        start, self._shown = self._shown, upto
        return self.text[start:upto]
