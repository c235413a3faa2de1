"""Generated sums are true, of every length, and held-out ones are what they are said to be."""

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

from pretrain.data.addition import items, read_documents, reverse
from pretrain.data.config import Corpus, DataConfig, DigitOrder, TokenizerConfig
from pretrain.data.digits import digit_ids
from pretrain.data.finished import build_settings
from pretrain.data.sources import find_parts
from pretrain.data.sources import read_documents as read_part
from pretrain.data.tokenizer import Tokenizer, describe, write_folder
from pretrain.data.tokenizer_sentencepiece import SentencePieceTokenizer
from pretrain.data.tokenizer_training import train, training_settings
from pretrain.errors import ConfigError, DataError


def data(**changes: object) -> DataConfig:
    settings = {"max_digits": 25, "max_bytes": 2_500_000} | changes
    return DataConfig(
        name="addition", corpus=Corpus.addition, shards="none", context=64, **settings
    )


def numbers(line: str) -> tuple[int, int, int]:
    """The three numbers of a line, which ends as a line."""
    a, rest = line.removesuffix("\n").split("+")
    b, c = rest.split("=")
    assert line.endswith("\n")
    return int(a[::-1]), int(b[::-1]), int(c[::-1])


def test_sums_are_true_and_all_lengths_are_as_likely() -> None:
    config = data()
    (part, *_) = find_parts(config)["addition"]
    lengths: Counter[int] = Counter()
    even = 0
    for document in itertools.islice(read_documents(part, config), 5000):
        a, b, c = numbers(document.text)
        assert a + b == c
        lengths.update((len(str(a)), len(str(b))))
        even += a % 2 == 0
    assert sorted(lengths) == list(range(1, 26))
    # 10,000 draws over 25 lengths: 400 of each, standard deviation 20
    assert max(abs(count - 400) for count in lengths.values()) < 5 * 20
    # one draw of 53 bits for a long number would leave its last digit even
    assert abs(even - 5000 * (1 / 2 - 1 / 25 / 18)) < 5 * 35


def test_parts_differ_and_hold_what_is_asked_for() -> None:
    config = data()
    parts = find_parts(config)["addition"]
    texts = [[document.text for document in read_part(part, config)] for part in parts]
    assert len(parts) == 3
    # each part ends with the sum that fills it
    assert 2_500_000 <= sum(len(text) for own in texts for text in own) < 2_500_000 + 3 * 80
    assert texts[0][:50] != texts[1][:50]
    again = [document.text for document in read_part(parts[0], config)]
    assert again == texts[0]


def test_items_are_different_sums_of_the_length_asked_for() -> None:
    found = items(21, 300, seed=0)
    for record in found:
        a, b, c = numbers(record["question"] + record["answer"])
        assert (a + b, len(str(a)), len(str(b))) == (c, 21, 21)
    assert len({record["question"] for record in found}) == 300
    assert {record["kind"] for record in found} == {"exact"}
    assert items(21, 300, seed=0) == found
    assert items(21, 300, seed=1)[0] != found[0]
    assert len(items(1, 81, seed=0)) == 81
    with pytest.raises(DataError, match="There are 81 sums of two numbers of 1 digits, not 82"):
        items(1, 82, seed=0)


def test_sums_from_the_highest_digit_are_true_wide_and_full_of_carries() -> None:
    config = data(digit_order=DigitOrder.highest, max_digits=12)
    (part, *_) = find_parts(config)["addition"]
    nines = places = 0
    for document in itertools.islice(read_documents(part, config), 3000):
        a, b, c = (text.removesuffix("\n") for text in re.split("[+=]", document.text))
        assert int(a) + int(b) == int(c)
        assert len(a) == len(b) == len(c) == max(len(str(int(a))), len(str(int(b)))) + 1
        common = min(len(str(int(a))), len(str(int(b)))) - 1
        pairs = [int(x) + int(y) for x, y in zip(a[::-1], b[::-1], strict=True)][:common]
        nines, places = nines + pairs.count(9), places + common
    # half of the sums: 1/10 of the places; the others: 3/4 + 1/4 of 1/10. Some 10,000 places, but
    # a sum's are alike: at most 12 together, so a standard deviation below 0.01
    assert abs(nines / places - (0.1 + 0.775) / 2) < 0.05
    for record in items(15, 50, seed=0, order=DigitOrder.highest):
        a, b, c = re.split("[+=]", record["question"] + record["answer"])
        assert int(a) + int(b) == int(c)
        # b's highest digit is its own, so its length is what was asked for
        assert len(str(int(a))) == len(str(int(b))) == 15


def test_digits_are_written_from_the_lowest_on() -> None:
    assert reverse(1200) == "0021"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_digits": None}, r"needs data\.max_digits of 1 or more, not None"),
        ({"max_digits": 0}, r"not 0"),
        ({"max_bytes": None}, r"and data\.max_bytes, not None"),
        ({"root": "text"}, "the addition corpus reads no folder"),
    ],
)
def test_what_a_corpus_of_sums_needs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(**changes)


def test_other_corpora_have_no_longest_operand() -> None:
    with pytest.raises(ConfigError, match=r"digit_order=highest would do nothing with .*files"):
        DataConfig(
            name="f", corpus=Corpus.files, root="x", shards="none", context=64,
            digit_order=DigitOrder.highest,
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"max_digits=3 would do nothing with .*embedded"):
        DataConfig(name="e", corpus=Corpus.embedded, shards="none", context=64, max_digits=3)


def test_a_tokenizer_of_sums_has_a_token_for_each_digit(tmp_path: Path) -> None:
    config = TokenizerConfig(path="none", vocabulary_size=301, train_bytes=50_000)
    model, _ = train(config, data())
    tokenizer = SentencePieceTokenizer(model)
    found = digit_ids(tokenizer)
    assert {tokenizer.decode([token]) for token in found} == set("0123456789")
    assert set(tokenizer.encode("90125")) <= set(found)
    assert not set(tokenizer.encode("+=\n")) & set(found)
    own = training_settings(config, data())
    for changes in ({"max_digits": 3}, {"digit_order": DigitOrder.highest}):
        assert training_settings(config, data(**changes)) != own
        assert build_settings(data(**changes), tokenizer) != build_settings(data(), tokenizer)
    write_folder(
        tmp_path / "kept", {"tokenizer.model": model}, describe(tokenizer, "sentencepiece")
    )
    assert digit_ids(Tokenizer.load(tmp_path / "kept")) == found


def test_tokens_of_several_digits_are_refused(published_tokenizer, tmp_path: Path) -> None:
    from pretrain.data.tokenizer_adopted import adopt_tokenizer

    for name, splits, size in (("split", True, 384), ("joined", False, 600)):
        published_tokenizer(tmp_path / name, size, splits_digits=splits)
        tokenizer = adopt_tokenizer(tmp_path / name, tmp_path / f"{name}-own", vocabulary_size=size)
        if splits:
            assert len(digit_ids(tokenizer)) == 10
        else:
            with pytest.raises(DataError, match=r"digits stand alone; in this one token \d+ is"):
                digit_ids(tokenizer)
