"""Floating-point operations of training and inference, counted from sizes. Imports no torch.

A multiplication and its addition are two operations, as in Kaplan et al. 2020 (arXiv 2001.08361): a matrix of N weights
costs 2 N per token forwards, and backwards 2 N for the gradient of its input and 2 N for that of its weights. Full
fine-tuning thus costs 6 N per token. LoRA's base weights get no gradient, which leaves 4 N.
"""

from __future__ import annotations

from collections.abc import Sequence

from tell.models.architecture import Architecture


def flops_paper(arch: Architecture, tokens: float) -> float:
    """6 N D, with N all parameters and D training tokens.

    The paper (arXiv 2404.00914, A.1) prints totals of 3e14 to 4e17 for 7B models and 1e4 to 1e7 tokens; 6 N D gives
    4e14 to 4e17 there. It overstates LoRA by about half; use it to compare with the paper's axes.
    """
    return 6.0 * arch.parameters * tokens


def training_flops(
    arch: Architecture,
    tokens: float,
    *,
    trained_tokens: float | None = None,
    lengths: Sequence[int] | None = None,
    lora_parameters: int = 0,
) -> float:
    """What LoRA training computes: 4 N for the blocks' matrices, 4 V H where a token is trained, and attention.

    Args:
        tokens: tokens fed, padding not counted.
        trained_tokens: tokens that carry loss; the output layer is needed only there. Default: all.
        lengths: tokens of each row, for attention, which grows with their squares. Default: attention left out
            (about 1 % of SmolLM2-135M at 200 tokens a row).
        lora_parameters: parameters of the adapter, each trained in full: 6 per token.
    """
    trained = tokens if trained_tokens is None else trained_tokens
    blocks = 4.0 * arch.linear_parameters * tokens
    output = 4.0 * arch.vocab * arch.hidden * trained
    # backwards, attention makes four products (for q, k, v and the weights) where forwards it makes two
    return blocks + output + 3.0 * _attention(arch, lengths or ()) + 6.0 * lora_parameters * tokens


def inference_flops(
    arch: Architecture, tokens: float, *, output_tokens: float | None = None, lengths: Sequence[int] | None = None
) -> float:
    """Forward passes only: 2 N per token, 2 V H where a next token is predicted.

    Args:
        tokens: tokens fed, prompts and answers.
        output_tokens: positions whose next token is predicted or scored. Default: all.
        lengths: tokens of each whole row, for attention. Default: attention left out.
    """
    output = tokens if output_tokens is None else output_tokens
    head = 2.0 * arch.vocab * arch.hidden * output
    return 2.0 * arch.linear_parameters * tokens + head + _attention(arch, lengths or ())


def lora_parameters(arch: Architecture, rank: int, targets: str = "all-linear") -> int:
    """Parameters of an adapter of ``rank`` on Llama's layout; ``targets`` as in ``train.lora_targets``.

    Fused matrices (Phi-3's qkv and gate-up) have somewhat fewer. ``all-linear`` leaves experts out.
    """
    h, q, kv = arch.hidden, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    sides = {
        "q_proj": h + q,
        "k_proj": h + kv,
        "v_proj": h + kv,
        "o_proj": q + h,
        "gate_proj": h + arch.intermediate,
        "up_proj": h + arch.intermediate,
        "down_proj": arch.intermediate + h,
    }
    return arch.layers * rank * sum(sides.get(name, 0) for name in adapted_layers(arch, targets))


def adapted_layers(arch: Architecture, targets: str) -> list[str]:
    """Names of a block's linear layers that ``train.lora_targets`` means, on Llama's layout."""
    if targets == "all-linear":
        mlp = [] if arch.experts > 1 else ["gate_proj", "up_proj", "down_proj"]
        return ["q_proj", "k_proj", "v_proj", "o_proj", *mlp]
    if targets == "qkv":
        return ["q_proj", "k_proj", "v_proj"]
    return [name.strip().rsplit(".", 1)[-1] for name in targets.split(",")]


def _attention(arch: Architecture, lengths: Sequence[int]) -> float:
    """Forward scores and their product with the values; a causal row of L tokens has L^2 / 2 pairs."""
    pairs = sum(float(length) ** 2 for length in lengths) / 2
    return 4.0 * arch.layers * arch.heads * arch.head_dim * pairs
