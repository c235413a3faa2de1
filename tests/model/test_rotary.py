"""Rotary positions: pairs, angles, relativity."""

import torch

from pretrain.model.rotary import angles, rotate


def test_adjacent_channels_turn_by_their_angle():
    positions = torch.tensor([[0, 3]])
    cos, sin = angles(positions, head_width=4, base=100.0)
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).expand(1, 2, 1, 4)
    found = rotate(x, cos, sin)[0, :, 0]
    # theta = 1 and 100^(-1/2) = 0.1
    quick, slow = torch.tensor(3.0), torch.tensor(0.3)
    expected = torch.stack([quick.cos(), quick.sin(), -2 * slow.sin(), 2 * slow.cos()])
    torch.testing.assert_close(found[0], x[0, 0, 0])
    torch.testing.assert_close(found[1], expected)


def test_scores_depend_on_the_distance_of_positions_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64).unbind(0)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        turned = [
            rotate(x, *angles(torch.tensor([[position]]), head_width=16, base=50_000.0))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    # Angles are float32: positions up to 57 leave 57 * 2^-24 = 3e-6 of angle.
    torch.testing.assert_close(score(7, 3), score(57, 53), atol=1e-4, rtol=0.0)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_positions_are_gathered_per_token():
    positions = torch.tensor([[0, 1, 0, 5], [2, 2, 1, 0]])
    cos, sin = angles(positions, head_width=8, base=50_000.0)
    table_cos, table_sin = angles(torch.arange(6)[None], head_width=8, base=50_000.0)
    assert torch.equal(cos, table_cos[0][positions])
    assert torch.equal(sin, table_sin[0][positions])


def test_bf16_input_is_turned_in_float32():
    x = torch.randn(1, 9, 2, 16).bfloat16()
    cos, sin = angles(torch.arange(4000, 4009)[None], head_width=16, base=50_000.0)
    assert cos.dtype == torch.float32
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())
