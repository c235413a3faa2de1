"""RMSNorm's arithmetic and its precision."""

import torch

from pretrain.model.norm import PlainRMSNorm, RMSNorm


def test_it_divides_by_the_root_mean_square_and_multiplies_by_the_gain():
    norm = RMSNorm(3, epsilon=0.25)
    with torch.no_grad():
        norm.gain.copy_(torch.tensor([1.0, 2.0, -1.0]))
    # mean square (1 + 4 + 1) / 3 = 2, plus 0.25, root 1.5
    found = norm(torch.tensor([[[1.0, -2.0, 1.0]]]))
    torch.testing.assert_close(found, torch.tensor([[[1.0, -4.0, -1.0]]]) / 1.5)


def test_bf16_input_has_float32_statistics_and_one_rounding_before_the_gain():
    x = (torch.randn(1, 5, 4096) * 300).bfloat16()
    norm = RMSNorm(4096, epsilon=1e-6).bfloat16()
    with torch.no_grad():
        norm.gain.fill_(1.0)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    found = norm(x)
    assert found.dtype == torch.bfloat16
    # Half a unit in the last of bf16's 8 places, plus float32 rounding: one rounding, not two.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8 * 1.001, atol=0.0)


def test_the_plain_norm_is_the_norm_with_a_gain_of_one():
    x = (torch.randn(1, 5, 64) * 30).bfloat16()
    norm = RMSNorm(64, epsilon=0.5).bfloat16()
    with torch.no_grad():
        norm.gain.fill_(1.0)
    plain = PlainRMSNorm(0.5)
    assert torch.equal(plain(x), norm(x))
    assert not list(plain.parameters())
