"""Stop strings in text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Gives text out up to the first stop string, the one whose end comes first, of those the longest.

    What may be the beginning of one is held back until that is certain, and not longer:

        text   …|---- given out ----|---- held: the longest end that begins a stop string ----|
    """

    def __init__(self, stops: Sequence[str], *, are_included: bool) -> None:
        self._stops = [(stop, _fallbacks(stop)) for stop in sorted(stops, key=len, reverse=True)]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._are_included = are_included
        self._num_matched = [0] * len(stops)
        self._held = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that ends it, after which nothing may be added."""
        if not self._held and self._first_characters.isdisjoint(piece):
            return piece, None
        for number, character in enumerate(piece, start=1):
            found = self._advance(character)
            if found is not None:
                text = self._held + piece[:number]
                self._held = ""
                return text if self._are_included else text[: -len(found)], found
        text = self._held + piece
        num_certain = len(text) - max(self._num_matched)
        self._held = text[num_certain:]
        return text[:num_certain], None

    def flush(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """One character on (Knuth, Morris, Pratt); the longest stop string that it completes."""
        for number, (stop, fallbacks) in enumerate(self._stops):
            matched = self._num_matched[number]
            while matched and stop[matched] != character:
                matched = fallbacks[matched]
            if stop[matched] == character:
                matched += 1
            self._num_matched[number] = matched
            if matched == len(stop):
                return stop
        return None


def _fallbacks(stop: str) -> list[int]:
    """For each length of a beginning of `stop`, the longest shorter beginning that it ends with."""
    fallbacks, length = [0, 0], 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = fallbacks[length]
        if stop[length] == character:
            length += 1
        fallbacks.append(length)
    return fallbacks
