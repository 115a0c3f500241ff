"""Next-token cross-entropy that never holds the logits of a whole sequence.

What is unusual: only positions with a label pass the language model head, a chunk of them at a time, and a chunk's
logits are computed again in the backward pass instead of being kept. The head is called as a module, so adapters on it,
FSDP and ZeRO work as ever; where each call gathers its weights, all ranks call it as often as the one with most chunks.
Same idea as Liger's fused linear cross-entropy, in PyTorch alone.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .ranks import largest_of_ranks, weights_are_sharded


LOGITS_AT_ONCE = 2**26  # numbers in one chunk of logits: 256 MiB in float32


def chunked_causal_lm_loss(
    lm_head: nn.Module,
    hidden_BND: Tensor,
    labels_BN: Tensor,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The loss of transformers' `ForCausalLMLoss(lm_head(hidden_BND), labels_BN, ...)`, gradients included.

    Args:
        lm_head: maps (n, D) to logits (n, vocab_size).
        hidden_BND: what the head would be given. labels_BN: int64, `ignore_index` where nothing is to be predicted;
            the label of position n + 1 is the target of position n.
        num_items_in_batch: what the sum is divided by (targets of all batches of an optimizer step); None divides by
            this batch's own number of targets.
        chunk_tokens: targets whose logits exist at once; None for as many as make 2**26 numbers.

    Returns:
        A scalar, float32 for half-precision inputs.

    Source: `transformers.loss.loss_utils.ForCausalLMLoss`.
    """
    targets_BN = nn.functional.pad(labels_BN[:, 1:], (0, 1), value=ignore_index).to(hidden_BND.device)
    chosen_BN = targets_BN != ignore_index
    hidden_TD, targets_T = hidden_BND[chosen_BN], targets_BN[chosen_BN]
    size = chunk_tokens or max(1, LOGITS_AT_ONCE // vocab_size)
    chunks = list(zip(hidden_TD.split(size), targets_T.split(size)))  # an empty one where there is no target at all
    if weights_are_sharded(lm_head):
        (most,) = largest_of_ranks([len(chunks)], hidden_TD.device)
        chunks += [(hidden_TD[:0], targets_T[:0])] * (most - len(chunks))
    total = sum(checkpoint(_chunk_loss, lm_head, *chunk, use_reentrant=False) for chunk in chunks)
    if num_items_in_batch is None:
        return total / targets_T.numel() if targets_T.numel() else total / total.new_zeros(())
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


def _chunk_loss(lm_head: nn.Module, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
    logits_TV = lm_head(hidden_TD)
    logits_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    return nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum")


__all__ = ["chunked_causal_lm_loss"]
