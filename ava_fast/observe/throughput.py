"""How much arithmetic a token costs, and which share of the machine's peak a run reaches (MFU)."""

from __future__ import annotations

import torch

from ava_fast.config import Config

# Dense bf16 tensor-core peaks from the vendors' data sheets, FLOP/s. fp32 runs have no entry: what a GPU makes of
# them depends on settings that a peak cannot tell.
BF16_PEAKS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


def active_parameters(config: Config) -> int:
    """Weights that multiply each token: without the embedding look-up and the experts that it is not sent to."""
    model, moe, M = config.model, config.moe, config.model.hidden_size
    attention = M * config.head_dim * (2 * model.num_heads + 2 * config.num_kv_heads)
    dense_layers = model.num_layers if moe.num_experts == 0 else model.num_dense_layers
    experts = moe.num_experts * M + 3 * M * moe.intermediate_size * (moe.top_k + moe.shared_experts)
    mlps = dense_layers * 3 * M * model.intermediate_size + (model.num_layers - dense_layers) * experts
    return model.num_layers * attention + mlps + M * model.vocab_size


def flops_per_token(config: Config, length: int) -> float:
    """Of forward and backward, in sequences of `length` (S): 6 per active parameter, and causal attention's
    6 · layers · heads · D · S (4·S·D per head and layer forward, halved by the mask, three times with backward).
    Recomputed activations do not count."""
    attention = 6 * config.model.num_layers * config.model.num_heads * config.head_dim * length
    return 6.0 * active_parameters(config) + attention


def peak_flops(config: Config, device: torch.device) -> float | None:
    """FLOP/s of one device at the run's precision, or None where that is not known."""
    if device.type != "cuda" or config.training.precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAKS.items() if part in name), None)
