"""When a token has been thought about enough: what each criterion measures after an iteration.

Every criterion compares what one iteration sees with what the check before it saw. The first
comparison is with a start that says nothing: the uniform distribution, an entropy no vocabulary
has, the initial state, no token. Source: arXiv 2502.05171, section 6.1, and its inference code.
"""

# A rows that still iterate  T tokens  D width  V vocabulary

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.decoding import Exit

# Of the likeliest token's probability; what is below counts as equally unlikely.
MIN_P = 0.1
# The entropy, in nats, "before" the first check.
START_ENTROPY = 100.0


class Watch:
    """What one criterion remembers of the rows that still iterate."""

    def __init__(self, exit: Exit, start_ATD: Tensor, vocabulary_size: int) -> None:
        """Before the first iteration, from the initial state of the rows."""
        self.exit = exit
        self._stable_A = torch.zeros(len(start_ATD), device=start_ATD.device)
        self._seen = _start(exit, start_ATD, vocabulary_size)

    def values(self, state_ATD: Tensor, logits_AV: Tensor | None = None) -> Tensor:
        """The criterion, float32 [A], after one more check; of the last token's logits."""
        before, now = self._seen, _look(self.exit, state_ATD, logits_AV)
        self._seen = now
        match self.exit:
            case Exit.kl | Exit.minp_kl:
                return (before.exp() * (before - now)).sum(-1)
            case Exit.entropy_diff:
                return (now - before).abs()
            case Exit.latent_diff:
                return ((now - before).norm(dim=-1) / now.norm(dim=-1)).mean(-1)
            case Exit.cosine:
                return 1.0 - F.cosine_similarity(now, before, dim=-1).mean(-1)
            case Exit.argmax_stability:
                self._stable_A = torch.where(now == before, self._stable_A + 1.0, 0.0)
                return self._stable_A
        raise AssertionError(self.exit)

    def is_enough(self, values_A: Tensor, threshold: float) -> Tensor:
        """Whether each row may exit, bool [A]."""
        if self.exit is Exit.argmax_stability:
            return values_A >= threshold
        return values_A < threshold

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self._seen, self._stable_A = self._seen[rows], self._stable_A[rows]


def _start(exit: Exit, start_ATD: Tensor, vocabulary_size: int) -> Tensor:
    rows, device = len(start_ATD), start_ATD.device
    match exit:
        case Exit.kl | Exit.minp_kl:
            return torch.full((rows, vocabulary_size), -math.log(vocabulary_size), device=device)
        case Exit.entropy_diff:
            return torch.full((rows,), START_ENTROPY, device=device)
        case Exit.argmax_stability:
            return torch.full((rows,), -1, device=device)
    return _wide(start_ATD)


def _look(exit: Exit, state_ATD: Tensor, logits_AV: Tensor | None) -> Tensor:
    if not exit.needs_logits:
        return _wide(state_ATD)
    assert logits_AV is not None, exit
    match exit:
        case Exit.argmax_stability:
            return logits_AV.argmax(-1)
        case Exit.minp_kl:
            return _flattened(logits_AV)
    log_p_AV = logits_AV.log_softmax(-1)
    return log_p_AV if exit is Exit.kl else -(log_p_AV.exp() * log_p_AV).sum(-1)


def _flattened(logits_AV: Tensor) -> Tensor:
    """Log probabilities after those below MIN_P times the largest have become 1 / V."""
    p_AV = logits_AV.softmax(-1)
    is_small_AV = p_AV < MIN_P * p_AV.amax(-1, keepdim=True)
    p_AV = p_AV.masked_fill(is_small_AV, 1.0 / p_AV.shape[-1])
    return (p_AV / p_AV.sum(-1, keepdim=True)).log()


def _wide(state_ATD: Tensor) -> Tensor:
    return state_ATD.to(torch.promote_types(state_ATD.dtype, torch.float32))
