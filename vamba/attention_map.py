"""How much each token of a video gave to an answer, from the cross-attention itself, in bounded memory.

What is unusual: nothing is measured while the answer is generated. The prompt and the answer pass the model once more,
on a fork of the memory, and hooks take from each layer its queries and the keys and values they read. The attention is
computed a few thousand video tokens at a time, once for the sum below the softmax and once for the weights, and is
reduced at once; so it takes the same memory for a minute and for a day, and the answer is not slowed down.

Shapes: A answer tokens, M video tokens without padding, C of them at a time, H heads, K key/value heads, G = H / K,
P head dim, T temporal patches.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

from .errors import UserError
from .modeling import VideoMemory
from .modeling.video_levels import VideoLevel


AT_ONCE = 2**24  # numbers of one tensor: 64 MiB in float32
Heads = str | Sequence[int]


@torch.no_grad()
def attention_map(
    model: nn.Module,
    memory: VideoMemory,
    prompt: Tensor,
    answer: Tensor,
    patches: Tensor,
    *,
    layers: Sequence[int] | None = None,
    heads: Heads = "mean",
    by: str = "contribution",
) -> tuple[Tensor, Tensor]:
    """The share of each video token in an answer.

    Args:
        model: a `VambaForConditionalGeneration`, with adapters or not.
        memory: of one row, extended by the text; give a fork.
        prompt: ids (1, N). answer: ids (1, A) that were generated after it. What predicts a token is what looked.
        patches: for each video token which temporal patch it belongs to, int64 (M,).
        layers: those that count, from 0 on, all alike; None for all.
        heads: "mean" or "max" over the heads of a layer, or the mean over these.
        by: "weights", the attention weights; or "contribution", the squared length of what they bring into the text:
            of the weight times the value after the output projection, times 1 - alpha of the layer. A weight alone may
            be large where the value is next to nothing (Kobayashi et al., 2020); squares add up where vectors do.

    Returns:
        float32 on the CPU: (M,), of sum 1, and (A, T), of sum 1, which tells the answer's tokens apart.

    Raises:
        UserError: layers, heads or `by` that there are not.
    """
    attentions = [(layer, layer.cross_attn) for layer in model.modules() if hasattr(layer, "cross_attn")]
    layers = range(len(attentions)) if layers is None else _checked("layers", layers, len(attentions))
    if heads not in ("mean", "max") if isinstance(heads, str) else False:
        raise UserError(f"heads is {heads!r:.80}; give 'mean', 'max' or a list of heads.")
    num_heads = model.config.get_text_config().num_attention_heads
    heads = heads if isinstance(heads, str) else _checked("heads", heads, num_heads)
    if by not in ("contribution", "weights"):
        raise UserError(f"by is {by!r:.80}; give 'contribution' or 'weights'.")
    by_video, by_token = torch.zeros(len(patches)), torch.zeros(answer.shape[1], int(patches.max()) + 1)

    def read(ids: Tensor, last: int, first: int, **options: Any) -> None:
        """The `last` of these ids predict the tokens of the answer from `first` on."""

        def add(layer: nn.Module, queries_NHP: Tensor, level: VideoLevel, mask_M: Tensor | None) -> None:
            nonlocal by_video, by_token, patches
            by_video, by_token, patches = (t.to(queries_NHP.device) for t in (by_video, by_token, patches))
            at = 0
            for weights_HAC in layer_weights(layer, queries_NHP[-last:], level, mask_M, by):
                weights_AC = _over_heads(weights_HAC, heads).to(by_video.dtype)
                tokens = slice(at, at + weights_AC.shape[1])
                by_video[tokens] += weights_AC.sum(0)
                by_token[first : first + last].index_add_(1, patches[tokens], weights_AC)
                at = tokens.stop

        with _hooked([attentions[index] for index in layers], add):
            model(input_ids=ids, past_key_values=memory, logits_to_keep=1, **options)

    # In two passes, as `generate` does: with `unrotate_video_keys` the second reads other keys than the first.
    read(prompt[:, memory.get_seq_length() :], last=1, first=0)
    if (rest := answer[:, :-1]).shape[1]:
        unrotated = getattr(model.generation_config, "unrotate_video_keys", False)
        read(rest, last=rest.shape[1], first=1, **({"unrotate_video_keys": True} if unrotated else {}))
    return by_video.cpu() / by_video.sum().cpu(), by_token.cpu() / by_token.sum().cpu()


def _checked(name: str, chosen: Any, count: int) -> list[int]:
    is_list = isinstance(chosen, Sequence) and len(chosen) > 0
    if not is_list or not all(type(index) is int and 0 <= index < count for index in chosen):
        raise UserError(f"{name} is {chosen!r:.80}; give numbers from 0 to {count - 1}.")
    return list(chosen)


@contextlib.contextmanager
def _hooked(attentions: list[tuple[nn.Module, nn.Module]], add: Callable) -> Iterator[None]:
    """Within, `add(layer, queries (N, H, P), level, mask (M,))` is called after each of these cross-attentions."""
    handles: list[Any] = []
    queries: dict[nn.Module, Tensor] = {}

    def hook(layer: nn.Module, attention: nn.Module) -> None:
        def keep(module, args, output):
            queries[attention] = output

        def take(module, args, kwargs, output):
            videos, positions = args[1:3]
            (text, level), *others = videos
            assert not others, "one row of text reads one row of video"
            q_1HNP = queries.pop(attention).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            if positions is not None:
                q_1HNP, _ = apply_rotary_pos_emb(q_1HNP, q_1HNP, *(t.to(q_1HNP.device) for t in positions))
            add(layer, q_1HNP[0].transpose(0, 1), level, None if text.mask_BM is None else text.mask_BM[0])

        handles.append(attention.q_proj.register_forward_hook(keep))
        handles.append(attention.register_forward_hook(take, with_kwargs=True))

    try:
        for layer, attention in attentions:
            hook(layer, attention)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _over_heads(weights_HAC: Tensor, heads: Heads) -> Tensor:
    if isinstance(heads, str):
        return weights_HAC.mean(0) if heads == "mean" else weights_HAC.amax(0)
    return weights_HAC[heads].mean(0)


def layer_weights(
    layer: nn.Module, queries_AHP: Tensor, level: VideoLevel, mask_M: Tensor | None, by: str
) -> Iterator[Tensor]:
    """Attention weights (H, A, C) of one layer, a part of the video after the other, without padding; `by` as above."""
    A, H, P = queries_AHP.shape
    K = level.keys_BHMP.shape[1]
    attention, exact = layer.cross_attn, torch.promote_types(queries_AHP.dtype, torch.float32)
    queries = (queries_AHP.to(exact) * attention.scaling).permute(1, 0, 2).reshape(K, -1, P)  # (K, G * A, P)
    grams_HPP = _output_grams(attention, H, queries_AHP).to(exact) if by == "contribution" else None
    alpha = layer.alpha.detach().clamp(0, 1).to(queries) if layer.alpha is not None else 0.0
    size = max(1, AT_ONCE // (H * max(A, P)))

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for start in range(0, level.length, size):
            tokens = slice(start, start + size)
            of_part = VideoLevel(*(None if t is None else t[:, :, tokens].to(queries.device) for t in level))
            keys, values = (t[0].to(exact) for t in of_part.stored_as(queries_AHP.dtype)[:2])
            mask_C = None if mask_M is None else mask_M[tokens].to(queries.device)
            if mask_C is not None:
                keys, values = keys[:, mask_C], values[:, mask_C]
            yield (queries @ keys.mT).unflatten(1, (H // K, A)).flatten(0, 1), values, mask_C  # (H, A, C)

    below = torch.full((H, A), -torch.inf, dtype=exact, device=queries.device)  # logarithm of the softmax's sum
    for logits_HAC, _, _ in parts():
        below = torch.logaddexp(below, logits_HAC.logsumexp(-1))
    for logits_HAC, values_KCP, _ in parts():
        weights_HAC = (logits_HAC - below[..., None]).exp_()
        if grams_HPP is not None:
            grams = grams_HPP.unflatten(0, (K, H // K))
            norms = ((values_KCP[:, None] @ grams) * values_KCP[:, None]).sum(-1).clamp(min=0).sqrt()  # (K, G, C)
            weights_HAC = (weights_HAC * norms.flatten(0, 1)[:, None] * (1 - alpha)).square()
        yield weights_HAC


def _output_grams(attention: nn.Module, H: int, like: Tensor) -> Tensor:
    """W_h^T W_h (H, P, P) of the part W_h of the output projection that a head's values pass, adapters included."""
    eye = torch.eye(H * attention.head_dim, dtype=like.dtype, device=like.device)
    weights_HPD = (attention.o_proj(eye) - attention.o_proj(torch.zeros_like(eye[:1]))).unflatten(0, (H, -1))
    exact = weights_HPD.to(torch.promote_types(like.dtype, torch.float32))
    return exact @ exact.mT
