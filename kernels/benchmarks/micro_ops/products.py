"""Matrix products and attention, which we leave to others: which of them, and how fast."""

# M rows  N columns of the result  K inner  T tokens  H heads  W head width

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from micro_ops.case import Case, Inputs, Outputs, Prepare, Run, Sizes, forward_of, normal
from pretrain_kernels.fp8 import LARGEST

# Half a unit in the last place of bfloat16 is 2^-9; sums of rounded terms stay below twice that.
PRODUCT_BOUND = 2.0**-8
# The probabilities are rounded too, and in backward their gradients.
ATTENTION_BOUND, ATTENTION_BACKWARD_BOUND = 2.0**-7, 2.0**-6
ATTENTION_CHECK_TOKENS = 512
LIMIT_SIZE, COPY_ELEMENTS = 8192, 1 << 29
DOCUMENT_TOKENS = (1000, 96, 1500, 260, 1240)


def limits() -> Iterator[Case]:
    """What this device does at best, in this run: the yardsticks, named by their limit."""
    yield Case(
        op="copy", shape=str(COPY_ELEMENTS), dtype=torch.bfloat16, size=COPY_ELEMENTS,
        amount=4.0 * COPY_ELEMENTS, limit="", check_size=1 << 20, make=_copy_inputs,
        providers={"torch": _copy}, exact=_copy, bound=0.0,
    )  # fmt: skip
    size = LIMIT_SIZE
    for op, case in (("gemm", product(size, size, size)), ("fp8", product_fp8(size, size, size))):
        yield replace(case, op=op, limit="")


def cases(sizes: Sizes) -> Iterator[Case]:
    """The model's products at one and four sequences, and its attention."""
    d, inner = sizes.width, sizes.inner
    for rows in (sizes.tokens, 4 * sizes.tokens):
        yield product(rows, 2 * inner, d)
        yield product(rows, 3 * d, d)
        # the awkward width: output of attention, of the adapter, of the MLP, gradient of the MLP
        for depth in (d, 2 * d, inner, 2 * inner):
            yield product(rows, d, depth)
    yield weight_gradient(2 * inner, d, sizes.tokens)
    yield product_fp8(sizes.tokens, 2 * inner, d)
    yield from attention(sizes)


def _copy_inputs(elements: int, device: torch.device) -> Inputs:
    return {"source": normal(elements, device=device), "target": normal(elements, device=device)}


def _copy(inputs: Inputs) -> Run:
    # a kernel, as those that are measured are; a memcpy inside a graph is slower
    return lambda: (torch.mul(inputs["source"], 1.0, out=inputs["target"]),)


def _factors(columns: int, inner: int, rows: int, device: torch.device) -> Inputs:
    left_MK, right_NK = normal(rows, inner, device=device), normal(columns, inner, device=device)
    return {"left": left_MK, "right": right_NK}


def _product(inputs: Inputs) -> Outputs:
    return (inputs["left"] @ inputs["right"].t(),)


def product(rows: int, columns: int, inner: int) -> Case:
    """X W^T in bfloat16."""
    return Case(
        op="gemm", shape=f"{rows}x{columns}x{inner}", dtype=torch.bfloat16, size=rows,
        amount=2.0 * rows * columns * inner, limit="gemm", bound=PRODUCT_BOUND,
        make=partial(_factors, columns, inner), providers={"torch": forward_of(_product)},
        exact=forward_of(_product),
    )  # fmt: skip


def weight_gradient(rows: int, columns: int, tokens: int) -> Case:
    """A float32 sum of weight gradients, to which one more is added."""

    def make(size: int, device: torch.device) -> Inputs:
        total = normal(rows, columns, device=device, dtype=torch.float32)
        dy_TM, x_TN = normal(size, rows, device=device), normal(size, columns, device=device)
        return {"total": total, "dy": dy_TM, "x": x_TN}

    def in_one(inputs: Inputs) -> Outputs:
        total, dy_TM, x_TN = inputs.values()
        return (torch.addmm(total, dy_TM.t(), x_TN, out_dtype=torch.float32, out=total),)

    def in_two(inputs: Inputs) -> Outputs:
        return (inputs["total"].add_(inputs["dy"].t() @ inputs["x"]),)

    return Case(
        op="weight gradient, float32 sum", shape=f"{rows}x{columns}x{tokens}",
        dtype=torch.bfloat16, size=tokens, amount=2.0 * rows * columns * tokens, limit="gemm",
        make=make, bound=PRODUCT_BOUND, exact=forward_of(in_two),
        providers={"addmm": forward_of(in_one), "mm, add": forward_of(in_two)},
    )  # fmt: skip


def _rows_of_fp8(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    scale_M1 = x_MK.float().abs().amax(1, keepdim=True) / LARGEST
    return (x_MK.float() / scale_M1).to(torch.float8_e4m3fn), scale_M1


def product_fp8(rows: int, columns: int, inner: int) -> Case:
    """The same of 8-bit rows, each with its scale."""

    def make(size: int, device: torch.device) -> Inputs:
        (left_MK, a_M1), (right_NK, b_N1) = (
            _rows_of_fp8(x) for x in _factors(columns, inner, size, device).values()
        )
        return {"left": left_MK, "a": a_M1, "right": right_NK, "b": b_N1}

    def scaled(inputs: Inputs) -> Outputs:
        result = torch._scaled_mm(
            inputs["left"], inputs["right"].t(), scale_a=inputs["a"], scale_b=inputs["b"].t(),
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
        return (result,)

    def exact(inputs: Inputs) -> Outputs:
        return ((inputs["left"] * inputs["a"]) @ (inputs["right"] * inputs["b"]).t(),)

    return Case(
        op="gemm fp8, row-wise", shape=f"{rows}x{columns}x{inner}", dtype=torch.float8_e4m3fn,
        size=rows, amount=2.0 * rows * columns * inner, limit="fp8", make=make,
        providers={"torch": forward_of(scaled)}, exact=forward_of(exact), bound=PRODUCT_BOUND,
    )  # fmt: skip


def _packed(sizes: Sizes, tokens: int, device: torch.device) -> Inputs:
    shape = (tokens, 3, sizes.heads, sizes.head_width)
    dout_THW = normal(tokens, sizes.heads, sizes.head_width, device=device)
    return {"qkv": normal(*shape, device=device), "dout": dout_THW}


def _heads_first(qkv_T3HW: Tensor) -> list[Tensor]:
    """Strided views [1, H, T, W] of the packed projection."""
    return [x_THW.transpose(0, 1)[None] for x_THW in qkv_T3HW.unbind(1)]


def _plain(mask, inputs: Inputs) -> Outputs:
    q_1HTW, k_1HTW, v_1HTW = _heads_first(inputs["qkv"])
    index_T = torch.arange(q_1HTW.shape[2], device=q_1HTW.device)
    is_seen_TT = mask(0, 0, index_T[:, None], index_T[None])
    scores_1HTT = q_1HTW @ k_1HTW.transpose(-1, -2) / q_1HTW.shape[-1] ** 0.5
    weights_1HTT = scores_1HTT.masked_fill(~is_seen_TT, -torch.inf).softmax(-1)
    return ((weights_1HTT @ v_1HTW)[0].transpose(0, 1),)


def _by(backend: SDPBackend, inputs: Inputs) -> Outputs:
    with sdpa_kernel(backend):
        out_1HTW = F.scaled_dot_product_attention(*_heads_first(inputs["qkv"]), is_causal=True)
    return (out_1HTW[0].transpose(0, 1),)


def _causal(batch, head, query, key):
    return query >= key


def _in_document(batch, head, query, key):
    """Causal within documents that end where the sums of DOCUMENT_TOKENS do."""
    begin, is_same = 0, False
    for length in DOCUMENT_TOKENS:
        end = begin + length
        both = (query >= begin) & (query < end) & (key >= begin) & (key < end)
        is_same, begin = both | is_same, end
    return is_same & (query >= key)


def _flex(mask) -> Prepare:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False)

    def function(block_mask, inputs: Inputs) -> Outputs:
        out_1HTW = attend(*_heads_first(inputs["qkv"]), block_mask=block_mask)
        return (out_1HTW[0].transpose(0, 1),)

    def prepare(inputs: Inputs) -> Run:
        tokens, device = len(inputs["qkv"]), inputs["qkv"].device
        block_mask = create_block_mask(mask, None, None, tokens, tokens, device=device)
        return partial(function, block_mask, inputs)

    return prepare


def _backward(forward: Prepare) -> Prepare:
    def prepare(inputs: Inputs) -> Run:
        qkv_T3HW = inputs["qkv"].detach().requires_grad_()
        outputs = forward(inputs | {"qkv": qkv_T3HW})()
        return lambda: torch.autograd.grad(outputs, qkv_T3HW, inputs["dout"], retain_graph=True)

    return prepare


def attention(sizes: Sizes) -> Iterator[Case]:
    """Causal, and causal within documents; backward includes packing the three gradients."""
    tokens = sizes.tokens
    causal = {
        "cuDNN": forward_of(partial(_by, SDPBackend.CUDNN_ATTENTION)),
        "FA2": forward_of(partial(_by, SDPBackend.FLASH_ATTENTION)),
    }
    scale = tokens / sum(DOCUMENT_TOKENS)
    pairs_of_documents = sum((length * scale) ** 2 for length in DOCUMENT_TOKENS) / 2
    for op, mask, pairs, providers in (
        ("attention", _causal, tokens**2 / 2, causal),
        ("attention in documents", _in_document, pairs_of_documents,
         {"FlexAttention": _flex(_in_document)}),
    ):  # fmt: skip
        exact = forward_of(partial(_plain, mask))
        for suffix, wrap, products, bound in (
            ("", lambda prepare: prepare, 2, ATTENTION_BOUND),
            (" backward", _backward, 5, ATTENTION_BACKWARD_BOUND),
        ):
            yield Case(
                op=op + suffix, shape=f"1x{sizes.heads}x{tokens}x{sizes.head_width} packed",
                dtype=torch.bfloat16, size=tokens, limit="gemm", bound=bound,
                check_size=min(tokens, ATTENTION_CHECK_TOKENS),
                amount=2.0 * products * sizes.heads * sizes.head_width * pairs,
                make=partial(_packed, sizes), exact=wrap(exact),
                providers={name: wrap(prepare) for name, prepare in providers.items()},
            )  # fmt: skip
