"""The gate before the clock: whose outputs are as near to float64 as plain PyTorch's."""

import torch
from torch import Tensor

from micro_ops.case import Case, clone, doubled

# Ours must be as accurate as eager; of others it is enough that they compute the same thing.
FACTORS = {"ours": 1.1}
FACTOR_OF_OTHERS = 2.0
# Where eager is right to the last bit by chance.
SLACK = 1e-7


def find_faults(case: Case, device: torch.device) -> dict[str, str]:
    """What is wrong, by provider; a provider that is not there is right."""
    inputs = case.make(case.check_size or case.size, device)
    exact = (case.exact or case.providers["eager"])(doubled(inputs))()
    errors = {}
    faults = {}
    for provider, prepare in case.providers.items():
        try:
            outputs = case.compared(prepare(clone(inputs))())
        except Exception as error:
            # one provider that does not run must not cost the others their turn
            faults[provider] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            continue
        assert len(outputs) == len(exact), f"{case.op}: {provider} returns {len(outputs)} tensors"
        errors[provider] = [relative(*pair) for pair in zip(outputs, exact, strict=True)]
    for provider, found in errors.items():
        factor = FACTORS.get(provider, FACTOR_OF_OTHERS)
        allowed = [
            case.bound if case.bound is not None else factor * error + SLACK
            for error in errors.get("eager", found)
        ]
        for index, (error, most) in enumerate(zip(found, allowed, strict=True)):
            # written so that NaN is a fault
            if not error <= most:
                faults[provider] = f"output {index} is off by {error:.2e}, allowed {most:.2e}"
    return faults


def relative(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    got, exact = got.detach().double(), exact.detach().double()
    assert got.shape == exact.shape, f"{tuple(got.shape)} instead of {tuple(exact.shape)}"
    scale = torch.linalg.vector_norm(exact)
    return float(torch.linalg.vector_norm(got - exact) / scale.clamp(min=1e-300))
