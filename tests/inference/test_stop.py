"""Stop strings: nothing of one is ever shown, and nothing else is lost."""

import random

import pytest

from fusedlm.inference.stop import StopMatcher


def cut(text: str, stops: list[str]) -> str:
    """The text before the first stop string, found the plain way."""
    return text[: min((text.index(s) for s in stops if s in text), default=len(text))]


@pytest.mark.parametrize("seed", range(300))
def test_in_pieces_it_is_as_in_one(seed: int) -> None:
    r = random.Random(seed)
    text = "".join(r.choices("ab\n", k=r.randrange(30)))
    stops = ["".join(r.choices("ab\n", k=r.randrange(1, 5))) for _ in range(r.randrange(3))]
    matcher, shown, at = StopMatcher(stops), "", 0
    while at < len(text):
        n = r.randrange(1, 4)
        shown += matcher.push(text[at : at + n])
        assert cut(text, stops).startswith(shown)
        at += n
    shown += matcher.finish()
    assert shown == cut(text, stops)
    assert (matcher.matched is not None) == any(s in text for s in stops)


def test_text_is_not_held_back_longer_than_needed() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("text E") == "text "
    assert matcher.push("Nx") == "ENx"


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3]])
def test_an_empty_stop_string_is_refused(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="not empty"):
        StopMatcher(stops)
