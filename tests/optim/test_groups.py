import pytest
import torch
from torch import nn

from pretrain.optim.groups import parameter_groups


def named(**shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [
        (name.replace("__", "."), nn.Parameter(torch.zeros(shape)))
        for name, shape in shapes.items()
    ]


def test_embedding_and_matrices_decay_and_norms_and_biases_do_not() -> None:
    parameters = named(
        embedding__weight=(8, 4),
        core__layers__0__norm_1__weight=(4,),
        core__layers__0__attention__qk_bias=(2, 1, 2, 2),
        core__layers__0__mlp__proj__weight=(4, 6),
    )
    decayed, undecayed = parameter_groups(parameters, weight_decay=0.1)
    assert [p.shape for p in decayed["params"]] == [(8, 4), (4, 6)]
    assert [p.shape for p in undecayed["params"]] == [(4,), (2, 1, 2, 2)]
    assert decayed["weight_decay"] == 0.1
    assert undecayed["weight_decay"] == 0.0


def test_a_tensor_of_unknown_kind_is_refused() -> None:
    with pytest.raises(AssertionError, match="gate"):
        parameter_groups(named(gate=(3,)), weight_decay=0.1)


def test_no_group_is_empty() -> None:
    assert len(parameter_groups(named(weight=(2, 2)), weight_decay=0.1)) == 1
