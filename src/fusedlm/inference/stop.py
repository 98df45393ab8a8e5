"""Find stop strings in text that comes in pieces, without showing the beginning of one."""

from collections.abc import Sequence


class StopMatcher:
    """Passes text through up to the first stop string; holds back an end that may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string."""
        if any(not isinstance(s, str) or not s for s in stops):
            raise ValueError(f"stop is {list(stops)!r}; expected strings that are not empty")
        self._stops = list(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """More text in; the text that can be shown out. After a match, nothing more comes out."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [(self._held.index(s), s) for s in self._stops if s in self._held]
        if found:
            at, self.matched = min(found, key=lambda f: (f[0], -len(f[1])))
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((_overlap(self._held, s) for s in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """The text held back, once no more comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
