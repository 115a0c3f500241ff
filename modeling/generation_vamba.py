"""What `generate` does differently for Vamba: media are encoded once, before rows are repeated for beams or samples.

What is unusual: transformers encodes media in the first forward pass, on inputs already expanded to all beams. We use
its hook for encoders instead, fill a `VideoMemory`, and hand that to generation as its cache, whatever cache was asked
for inside.
"""

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_masks_for_generate

from .graphed_decoding import GraphedDecoding
from .media import uncached_media, without_seen_grids
from .ranks import calls_are_shared
from .video_memory import VideoMemory


_SUFFIXES = {"image": "", "video": "_videos"}  # of pixel_values


class VambaGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model whose `model` is a `VambaModel`."""

    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds=None, is_first_iteration: bool | None = False, **kwargs
    ):
        """The original rotates the keys of the video only in the pass that encodes it and decodes with bare ones.

        Checkpoints converted from it keep to that where it matters (`cross_attn_use_position_embeddings`), by
        `unrotate_video_keys` in their generation config; without it, decoding equals the full forward pass.

        Raises:
            ValueError: a static text cache is full.
        """
        _check_room(kwargs.get("past_key_values"), input_ids, kwargs.get("attention_mask"))
        kwargs["unrotate_video_keys"] = kwargs.pop("unrotate_video_keys", False) and not is_first_iteration
        memory = kwargs.pop("video_memory", None)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if memory is not None:  # without a text cache the video is encoded once all the same
            model_inputs["past_key_values"] = memory
        return model_inputs

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache, **kwargs
    ):
        """As transformers', but for the single tokens of decoding in two kernels, as it is made anew for each of them.

        A new token sees what the padding mask lets through, itself included, and no slot of the cache after it.
        """
        kind = config.get_text_config()._attn_implementation
        if inputs_embeds.shape[1] != 1 or attention_mask is None or kind != "sdpa":
            return create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs)
        free = past_key_values.get_max_length() - attention_mask.shape[1]
        return nn.functional.pad(attention_mask.bool(), (0, free))[:, None, None]

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """Whether tokens are decoded by `get_compiled_call`, that is, unless asked otherwise, by a CUDA graph."""
        watched = generation_config.compile_config is None and GraphedDecoding.is_watched(self)
        return not watched and super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        if getattr(generation_config, "unrotate_video_keys", False):
            model_kwargs["unrotate_video_keys"] = True
        pixels = {kind: model_kwargs.pop(f"pixel_values{suffix}", None) for kind, suffix in _SUFFIXES.items()}
        grids = {kind: model_kwargs.pop(f"{kind}_grid_thw", None) for kind in _SUFFIXES}
        cache = model_kwargs.get("past_key_values")
        grids = without_seen_grids(pixels, grids, getattr(cache, "media", []))
        given = any(given is not None for given in (*pixels.values(), *grids.values()))
        if not given and not calls_are_shared(self):
            return model_kwargs
        input_ids = model_kwargs.get("input_ids") if inputs_tensor.is_floating_point() else inputs_tensor
        if input_ids is not None and input_ids.shape[1] != inputs_tensor.shape[1]:
            input_ids = None  # `inputs_embeds` came by themselves
        types = model_kwargs.get("mm_token_type_ids")
        rows = self.model.media_rows(input_ids, inputs_tensor, types, pixels, grids)
        if cache is not None:
            starts_BN = self.model.media_starts(input_ids, inputs_tensor)
            rows = uncached_media(rows, starts_BN, types, cache.get_seq_length())
        memory = VideoMemory.of(cache, self.config.text_config)
        self.model.encode_media([(memory, rows)] if any(rows) else [], pixels)
        if any(rows):
            model_kwargs["video_memory"] = memory
        return model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args):
        memory = model_kwargs.pop("video_memory", None)
        past = model_kwargs.get("past_key_values")
        if generation_mode == GenerationMode.ASSISTED_GENERATION and past is not None and past.is_compileable:
            raise ValueError(
                "Assisted decoding takes tokens back, which a static text cache cannot: ask on a fork() without "
                "max_cache_len."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, *args)
        cache = model_kwargs.get("past_key_values")
        if memory is not None and past is None:
            memory = memory.with_text(cache)
        elif memory is None:
            memory = VideoMemory.of(cache, self.config.text_config) if cache is not None else None
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if memory is not None:
            memory.expand_rows(batch_size, copies)
            if generation_config.compile_config is not None:
                memory.mark_static()
            model_kwargs["past_key_values" if cache is not None else "video_memory"] = memory


def _check_room(cache: Cache | None, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """On a GPU a static cache itself would not say that it is full, or would take the process with it."""
    if cache is None or not cache.is_compileable:
        return
    tokens = max(t.shape[1] for t in (input_ids, attention_mask) if isinstance(t, Tensor))
    if tokens > (room := cache.get_max_length()):
        raise ValueError(
            f"The static text cache has room for {room} tokens, and this is token {tokens}: make it longer with "
            "max_cache_len, or ask on a fork() without it."
        )
