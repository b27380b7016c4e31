"""Text to token ids and back: characters as tokens, and what every tokenizer has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lightning_tta.errors import ConfigError, in_one_line

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""A new line, and all printable characters of ASCII."""


@runtime_checkable
class Tokenizer(Protocol):
    """What prompts need of a tokenizer, under the names of transformers, whose tokenizers have all of it."""

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills rows up; ``None`` where there is none."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text; ``None`` where there is none."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; ``None`` where there is none."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with special tokens as at the beginning of a text."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""


class CharTokenizer:
    """Each character is a token. Ids 0 to 3 are padding, beginning, end, and any character that is not known.

    Args:
        characters: The characters that are known, each once, in the order of their ids, from 4 on.

    Attributes:
        pad_token_id: 0.
        bos_token_id: 1; ``encode`` puts it before a text.
        eos_token_id: 2; nothing puts it behind a text but the training.
        unk_token_id: 3; decoded as U+FFFD.
        vocab_size: Number of ids.

    Raises:
        ConfigError: If there are no characters, or one is there twice.
    """

    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    unk_token_id: int = 3

    def __init__(self, characters: str = CHARACTERS) -> None:
        if not isinstance(characters, str) or not characters or len(set(characters)) < len(characters):
            raise ConfigError(f"characters must be a text with each character once; got {characters!r}.")
        self.characters = characters
        self._ids = {character: number for number, character in enumerate(characters, start=4)}

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.characters) + 4

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of the characters, behind the id of the beginning."""
        ids = [self._ids.get(character, self.unk_token_id) for character in text]
        return [1, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int] | Any, skip_special_tokens: bool = False) -> str:
        """The characters of ids, a sequence or a tensor (T,); special tokens as ``<pad>``, ``<bos>``, ``<eos>``."""
        special = ("", "", "", "\ufffd") if skip_special_tokens else ("<pad>", "<bos>", "<eos>", "\ufffd")
        symbols = (*special, *self.characters)
        return "".join(symbols[int(number)] for number in ids)


def load_tokenizer(name: str, download: bool = False) -> Tokenizer:
    """A tokenizer of transformers. No code of a folder or the hub is run.

    Args:
        name: A folder that ``save_pretrained`` wrote, or a name on the hub whose files are in the cache.
        download: Whether files may be fetched.

    Raises:
        ConfigError: If transformers is not installed, or finds no tokenizer there.
    """
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tokenizer={name!r} needs transformers: pip install 'lightning-tta[transformers]'. Without a name, "
            "characters are tokens."
        ) from error
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(  # type: ignore[assignment]
            name, local_files_only=not download, trust_remote_code=False
        )
    except Exception as error:  # damaged files provoke any
        raise ConfigError(
            f"tokenizer={name!r}: transformers finds no tokenizer there ({in_one_line(error)[:300]}). Give a folder "
            "that save_pretrained wrote; or allow the name to be fetched from the hub: --data.download true."
        ) from error
    return tokenizer
