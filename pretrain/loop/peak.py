"""What a card could multiply at most: the number that a utilisation is a share of."""

import torch

from pretrain.config import TrainConfig
from pretrain.engine.config import Precision

# Dense bf16 FLOP/s of the makers' data sheets, by the name that the driver gives; of one die where
# a card has two.
DATASHEET_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA B200": 2250e12,
    "AMD Instinct MI250X": 191.5e12,
}


def peak_flops(config: TrainConfig, device: torch.device) -> float:
    """FLOP/s of one rank's device: the data sheet's for bf16 on a card that is listed, else
    cluster.gpu_flops, which is what the planner calculates with.
    """
    if device.type == "cuda" and config.engine.precision is Precision.bf16:
        name = torch.cuda.get_device_name(device)
        return DATASHEET_FLOPS.get(name, config.cluster.gpu_flops)
    return config.cluster.gpu_flops
