"""Which tokens of a vocabulary are digits, for a model that gives digits places."""

from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import DataError

DIGITS = "0123456789"


def digit_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token that is one of the digits 0 to 9, ascending.

    Raises DataError unless the tokenizer reads every number digit by digit.
    """
    found = []
    for token in range(tokenizer.vocabulary_size):
        text = tokenizer.decode([token])
        if text in DIGITS and len(text) == 1:
            found.append(token)
        elif len(text) > 1 and any(digit in text for digit in DIGITS) and _is_text(tokenizer, text):
            raise DataError(
                f"model.digit_positions needs a tokenizer whose digits stand alone; in this one "
                f"token {token} is {text!r}. Train one with `pretrain data tokenizer`, or set "
                "model.digit_positions=null."
            )
    for digit in DIGITS:
        ids = tokenizer.encode(digit)
        if len(ids) != 1 or ids[0] not in found:
            raise DataError(
                f"model.digit_positions needs a token for every digit; this tokenizer reads "
                f"{digit!r} as the ids {ids}. Train one on text with numbers, or set "
                "model.digit_positions=null."
            )
    return tuple(found)


def _is_text(tokenizer: Tokenizer, text: str) -> bool:
    """Whether text is read that way; special tokens may have digits in their names."""
    return text not in tokenizer.special_names.values()
