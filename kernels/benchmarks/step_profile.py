"""Where the time of a step goes: kernels of one profiled step, by class."""

import csv
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

CLASSES = (
    ("communication", r"nccl"),
    ("attention", r"fmha|flash|flex|sdpa|cudnn.*(attn|sm90)|cudnn::fusion"),
    # cuBLAS says with letters what it multiplies: q is float8
    ("float8 product", r"e4m3|f8|fp8|nvjet_\w*_qq"),
    ("matrix product", r"gemm|cutlass|nvjet|cublas|xmma|splitk"),
    ("norm chain", r"chain|(rms|layer)_?norm|^_(walk_backward|output_row)$"),
    # the last two names are those of before 2026-11-26
    ("rotary and SwiGLU", r"rope|swiglu|silu|^_(forward|backward)$"),
    ("cross-entropy", r"softmax|nats|entropy|^_gradient$"),
    ("quantize", r"quantize|^_find_(maxima|scales)$"),
    ("optimizer", r"^_(moments|weights|adamw|squares|add)$"),
    ("copies and fills", r"memcpy|memset|fill|copy"),
)


def profile_step(step: Callable[[], object], path: Path, is_kept: bool = True) -> None:
    """Print and write the GPU time of one step by class, and its largest kernels.

    Of several ranks all take the steps, and one keeps what it finds.
    """
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    if not is_kept:
        return
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in found.key_averages():
        device_us = getattr(event, "self_device_time_total", 0.0)
        # what a range of the host took on the GPU is listed, too, beside its kernels
        is_range = getattr(event, "is_user_annotation", False)
        is_kernel = event.device_type == DeviceType.CUDA and not is_range
        if device_us > 0 and is_kernel:
            times[event.key] += device_us
            counts[event.key] += event.count
    total = sum(times.values())
    by_class: dict[str, float] = defaultdict(float)
    for key, device_us in times.items():
        by_class[class_of(key)] += device_us
    print(f"profile: {total / 1e3:.1f} ms of kernels")
    for name, device_us in sorted(by_class.items(), key=lambda item: -item[1]):
        print(f"  {name:18} {device_us / 1e3:8.2f} ms {device_us / total:6.1%}")
    rows = sorted(times.items(), key=lambda item: -item[1])
    for key, device_us in rows[:14]:
        print(f"    {device_us / 1e3:8.2f} ms {counts[key]:5} x {key[:110]}", flush=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "kernel", "calls", "total_us"))
        for key, device_us in rows:
            writer.writerow((class_of(key), key[:300], counts[key], round(device_us, 1)))


def class_of(kernel: str) -> str:
    """Which part of the step a kernel belongs to, by its name."""
    for name, pattern in CLASSES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    return "elementwise and other"
