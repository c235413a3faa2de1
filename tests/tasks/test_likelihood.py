"""Whether a continuation is what greedy decoding writes, told in the pass that gives its nats."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.world import World
from pretrain.loop.trained import load_trained
from pretrain.loop.validation import STATE_SEED
from pretrain.model.block import SandwichBlock
from pretrain.model.config import ComputePath, ProductPrecision
from pretrain.model.decoding import Decoding
from pretrain.model.generation import generate
from pretrain.model.recurrent import RecurrentModel
from pretrain.tasks.likelihood import Row, Subject, greedy_nats_of, nats_of
from pretrain.tasks.prompts import cut
from pretrain.testing import load_module

PATHS = load_module(Path(__file__).parents[1] / "model" / "fused" / "both_paths.py")
DEPTH = 5


ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def subject(run_dir: Path, request: pytest.FixtureRequest) -> Subject:
    device = torch.device(request.param)
    trained = load_trained(run_dir, device, dtype=torch.float32)
    return Subject(
        model=trained.model,
        tokenizer=Tokenizer.load(trained.config.tokenizer.path),
        world=World(0, 1, 0, device),
        depths=(DEPTH,),
        batch_tokens=256,
    )


def written(subject: Subject, prompt: str, tokens: int) -> tuple[list[int], list[int]]:
    """A prompt's ids, and those that greedy decoding adds, from the states of `nats_of`."""
    ids = [subject.tokenizer.special.begin_text, *subject.tokenizer.encode(prompt)]
    how = Decoding(num_steps=DEPTH, max_new_tokens=tokens, seed=STATE_SEED)
    return ids, [chosen.token for chosen in generate(subject.model, ids, how)]


def test_only_what_greedy_decoding_writes_is_greedy(subject: Subject) -> None:
    rows, expected = [], []
    for prompt, tokens in (("The heron", 9), ("1 + 1 =", 1), ("A", 70)):
        given, greedy = written(subject, prompt, tokens)
        rows.append(Row((*given, *greedy), tokens))
        expected.append(True)
        for at in {0, tokens // 2, tokens - 1}:
            other = list(greedy)
            other[at] = (other[at] + 1) % subject.model.config.vocabulary_size
            # what is scored is another token there; behind it, nothing is what would follow
            rows.append(Row((*given, *other[: at + 1]), at + 1))
            expected.append(False)
    # what is not scored may be anything
    rows.append(Row((*rows[0].ids[:3], *rows[0].ids[2:]), 0))
    expected.append(True)
    found = greedy_nats_of(subject, rows, "rows")
    assert [is_greedy for _, is_greedy in found] == expected
    # the same products in the same order
    assert [nats for nats, _ in found] == [nats for (nats,) in nats_of(subject, rows, "rows")]
    assert found[-1][0] == 0.0


def test_float8_weights_are_quantized_once_for_all_batches(run_dir: Path) -> None:
    trained = load_trained(run_dir, torch.device("cpu"))
    float8 = ProductPrecision.fp8
    model = RecurrentModel(
        dataclasses.replace(trained.config.model, path=ComputePath.fused, grad_precision=float8)
    ).to(torch.bfloat16)
    model.load_state_dict(trained.model.state_dict())
    subject = Subject(
        model=model.eval(),
        tokenizer=Tokenizer.load(trained.config.tokenizer.path),
        world=World(0, 1, 0, torch.device("cpu")),
        depths=(1, DEPTH),
        batch_tokens=64,
    )
    rows = [Row((1, 2, 3 + at), 1) for at in range(3)]
    with PATHS.counted_copies() as counted:
        together = nats_of(subject, rows, "rows")
    layers = sum(isinstance(module, SandwichBlock) for module in model.modules())
    assert counted == {"quantize_rows": 4 * layers}
    # rows of 64 padded tokens: each is a batch of its own, so alone it is the same pass
    assert together == [nats_of(subject, [row], "row")[0] for row in rows]


def test_an_end_before_the_first_word_counts_only_if_it_is_told_to() -> None:
    assert cut("\n7\n8", ("\n",)) == "\n7"
    assert cut("\n7\n8", ("\n",), counts_blank=True) == ""
    assert cut("7", ("\n",), counts_blank=True) is None
    assert cut("a b c", ("c", "b"), counts_blank=True) == "a "
