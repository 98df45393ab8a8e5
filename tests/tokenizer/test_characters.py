"""CharacterTokenizer: ids by sorted character, errors that name the character, and its file."""

from pathlib import Path

import pytest

from fusedlm.tokenizer.characters import CharacterTokenizer
from fusedlm.tokenizer.load import load_tokenizer

TEXT = "hello wörld 😀\n"


def test_ids_are_places_among_the_sorted_characters() -> None:
    tokenizer = CharacterTokenizer.from_text(TEXT)
    characters = "\n dehlorwö😀"
    assert tokenizer.vocab_size == len(characters)
    assert tokenizer.encode(TEXT) == [characters.index(character) for character in TEXT]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("") == []
    assert [tokenizer.token_bytes(id) for id in range(11)] == [c.encode() for c in characters]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.add_bos, tokenizer.chat_template) == (
        None,
        None,
        frozenset(),
        False,
        None,
    )
    assert not tokenizer.is_special(0)
    assert tokenizer.split_special(TEXT) == [TEXT]
    assert tokenizer.split_special("") == []


def test_what_it_does_not_know() -> None:
    tokenizer = CharacterTokenizer.from_text(TEXT)
    with pytest.raises(ValueError, match=r"character 'é' \(U\+00E9\) at position 2 is not among the 11"):
        tokenizer.encode("heé")
    for id in (-1, 11):
        with pytest.raises(ValueError, match=rf"id {id} has no character; ids go from 0 to 10"):
            tokenizer.decode([0, id])
        with pytest.raises(ValueError, match="has no character"):
            tokenizer.token_bytes(id)
    with pytest.raises(ValueError, match="no bos token"):
        tokenizer.encode("hello", add_bos=True)
    with pytest.raises(ValueError, match="text is bytes"):
        tokenizer.encode(b"hello")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D800, at position 1"):
        tokenizer.encode("h\ud800")


def test_characters_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no characters"):
        CharacterTokenizer.from_text("")
    with pytest.raises(ValueError, match=r"'b' \(U\+0062\) is there twice"):
        CharacterTokenizer("abcb")
    with pytest.raises(ValueError, match="lone surrogate"):
        CharacterTokenizer.from_text("a\ud800")


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer.from_text(TEXT + '\u2028\x00\r"\\')
    tokenizer.save(tmp_path / "new" / "folder")
    again = load_tokenizer(tmp_path / "new" / "folder")
    assert isinstance(again, CharacterTokenizer)
    assert again.characters == tokenizer.characters
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[]", "holds a list; expected an object"),
        ("{}", r"has the keys \[\]; expected characters"),
        ('{"characters": "ab", "more": 1}', r"has the keys \['characters', 'more'\]"),
        ('{"characters": ["a"]}', "characters.json: characters is list; expected str"),
        ('{"characters": ""}', "characters.json: there are no characters"),
        ('{"characters": "aa"}', r"characters.json: character 'a' \(U\+0061\) is there twice"),
        (r'{"characters": "a\ud800"}', r"characters.json: characters has a lone surrogate, U\+D800, at position 1"),
    ],
)
def test_broken_files(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "characters.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_two_tokenizers_in_a_directory(tmp_path: Path) -> None:
    CharacterTokenizer.from_text("ab").save(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"both characters.json and a BPE tokenizer's files"):
        load_tokenizer(tmp_path)
