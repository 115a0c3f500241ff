"""How `generate` differs for the two models: media are read once, before rows are repeated for beams.

What is unusual: transformers encodes media in the first forward pass, when inputs are already repeated for all beams
or samples. We use its hook for encoders instead. In Vamba the hook fills a `VideoMemory`, which becomes the cache and
contains whatever cache was asked for. In Video-Ma2mba a `StateMemory` reads all of the prompt but its last token; as
the model cannot continue without one, `use_cache=False` has no effect.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import CompileConfig, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_masks_for_generate

from .graphed_decoding import GraphedDecoding, GraphedStateDecoding
from .media import item_starts, list_media, runs_of, to_device, uncached_media, unread_media, without_seen_grids
from .ranks import calls_are_shared, weights_are_sharded
from .state_memory import StateMemory
from .video_memory import VideoMemory


def _pop_media(model_kwargs: dict, cache: Cache | None) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Takes patches and `grid_thw` out of `model_kwargs`, and drops the grids of media that the cache has seen."""
    pixels = {kind: model_kwargs.pop(f"pixel_values{end}", None) for kind, end in (("image", ""), ("video", "_videos"))}
    grids = {kind: model_kwargs.pop(f"{kind}_grid_thw", None) for kind in pixels}
    return pixels, without_seen_grids(pixels, grids, getattr(cache, "media", []))


def _copies(generation_config) -> int:
    """Counts the rows that `generate` makes of each."""
    return max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)


class VambaGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model whose `model` is a `VambaModel`."""

    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds=None, is_first_iteration: bool | None = False, **kwargs
    ):
        """Passes on the video memory, and after the first step whether the video's keys are read without rotation.

        The original rotates the video's keys only in the pass that encodes it, and decodes with keys that are not
        rotated. Checkpoints converted from it do the same if `cross_attn_use_position_embeddings` makes it matter, by
        `unrotate_video_keys` in their generation config. Without it, decoding equals the full forward pass.

        Raises:
            ValueError: a static text cache is full.
        """
        _check_room(kwargs.get("past_key_values"), input_ids, kwargs.get("attention_mask"))
        kwargs["unrotate_video_keys"] = kwargs.pop("unrotate_video_keys", False) and not is_first_iteration
        memory = kwargs.pop("video_memory", None)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if memory is not None:  # With use_cache=False, too, the video is encoded only once.
            model_inputs["past_key_values"] = memory
        return model_inputs

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache, **kwargs
    ):
        """Makes the masks that transformers makes, but takes only two kernels for that of a single token.

        A new token sees what the padding mask allows, itself included, and no slot of the cache after it.
        """
        kind = config.get_text_config()._attn_implementation
        if inputs_embeds.shape[1] != 1 or attention_mask is None or kind != "sdpa":
            return create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs)
        free = past_key_values.get_max_length() - attention_mask.shape[1]
        return nn.functional.pad(attention_mask.bool(), (0, free))[:, None, None]

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """Returns the step that decodes with a static cache: a CUDA graph, or `torch.compile`'s if it is configured."""
        if compile_config is None and GraphedDecoding.suits(self):
            return GraphedDecoding(self.__call__)
        return super().get_compiled_call(compile_config)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        watched = generation_config.compile_config is None and GraphedDecoding.is_watched(self)
        return not watched and super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        if getattr(generation_config, "unrotate_video_keys", False):
            model_kwargs["unrotate_video_keys"] = True
        cache = model_kwargs.get("past_key_values")
        pixels, grids = _pop_media(model_kwargs, cache)
        if all(given is None for given in (*pixels.values(), *grids.values())) and not calls_are_shared(self):
            return model_kwargs
        input_ids = model_kwargs.get("input_ids") if inputs_tensor.is_floating_point() else inputs_tensor
        if input_ids is not None and input_ids.shape[1] != inputs_tensor.shape[1]:
            input_ids = None  # The prompt was given as `inputs_embeds` only.
        types = model_kwargs.get("mm_token_type_ids")
        times = model_kwargs.pop("video_times", None)
        rows = self.model.media_rows(input_ids, inputs_tensor, types, pixels, grids, video_times=times)
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
                "Assisted decoding takes tokens back, which a static text cache cannot do: use a memory's fork() "
                "without max_cache_len."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, *args)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and memory is None:
            memory = VideoMemory.of(cache, self.config.text_config)
        elif cache is not None and past is None:
            memory = memory.with_text(cache)
        if memory is not None:
            memory.expand_rows(batch_size, _copies(generation_config))
            if generation_config.compile_config is not None:
                memory.mark_static()
            model_kwargs["past_key_values" if cache is not None else "video_memory"] = memory


def _check_room(cache: Cache | None, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raises ValueError if a static cache is full, as on a GPU it would overwrite memory or end the process."""
    if cache is None or not cache.is_compileable:
        return
    tokens = max(t.shape[1] for t in (input_ids, attention_mask) if isinstance(t, Tensor))
    if tokens > (room := cache.get_max_length()):
        raise ValueError(
            f"The static text cache has room for {room} tokens, and this is token {tokens}: make it longer with "
            "max_cache_len, or use a fork() of the memory without it."
        )


class VideoMa2mbaGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model whose `model` is a `VideoMa2mbaModel`."""

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        """Drops the mask after the prompt, as only the prompt is padded: every row reads every later token."""
        if not is_first_iteration:
            kwargs.pop("read_hidden_states", None)
        kwargs |= {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        inputs = super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)
        if next_sequence_length == 1 and not is_first_iteration:
            inputs.pop("attention_mask", None)
        return inputs

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """Returns the step that decodes on a GPU: a CUDA graph, or `torch.compile`'s if that is configured."""
        if compile_config is None:
            return GraphedStateDecoding(self.__call__)
        return super().get_compiled_call(compile_config)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """Repeats transformers' criteria where they ask for a static cache of keys and values."""
        if generation_config.disable_compile or generation_config.compile_config is not None:
            return super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        if not GraphedDecoding.suits(self) or GraphedDecoding.is_watched(self) or weights_are_sharded(self):
            return False
        quantizer = getattr(self, "hf_quantizer", None)
        return quantizer is None or quantizer.is_compileable

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        generation_config.use_cache = True
        memory = StateMemory.of(model_kwargs.get("past_key_values"), self.config)
        pixels, grids = _pop_media(model_kwargs, memory)
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("A prompt is padded on the right, where its answer begins. Pad with padding_side='left'.")
        length = inputs_tensor.shape[1]
        total = getattr(generation_config, "_mask_length", length)
        total = total if attention_mask is None else attention_mask.shape[1]
        first = memory.text_length if total == length else 0  # number of the prompt's tokens that the memory has read
        if first >= length:
            raise ValueError(
                f"The memory has read {first} tokens of text and the prompt has {length}. A prompt is the whole "
                "conversation: one <|vision_start|><|vision_end|> for each video watched, and then the question."
            )
        if inputs_tensor.is_floating_point():
            input_ids, inputs_embeds = None, inputs_tensor
        else:
            input_ids, inputs_embeds = inputs_tensor, self.get_input_embeddings()(to_device(inputs_tensor, self.device))
        starts_BN = self.model.media_starts(input_ids, inputs_embeds).to(inputs_embeds.device)
        unread_BN = torch.zeros_like(starts_BN)
        unread = memory.unread(attention_mask, inputs_embeds[:, first:])
        unread_BN[:, first:] = True if unread is None else unread.to(unread_BN.device)
        types = model_kwargs.get("mm_token_type_ids")
        if total == length:
            _check_prefix(memory, starts_BN & ~unread_BN, types)
        images = list_media("image", pixels["image"], grids["image"])
        videos = list_media("video", pixels["video"], grids["video"], model_kwargs.pop("video_times", None))
        if images or videos:
            rows, starts_BN = unread_media(images, videos, starts_BN, unread_BN, types)
            if starts_BN[:, -1].any():
                raise ValueError("The prompt ends with <|vision_start|>. Write <|vision_end|> after it.")
            unread_BN, starts_BN = unread_BN[:, :-1], starts_BN[:, :-1]
            memory.expand_rows(len(rows))
            memory.check(self.config.text_config, len(rows))
            wanted = bool(generation_config.return_dict_in_generate and generation_config.output_hidden_states)
            runs = runs_of(unread_BN, starts_BN, rows)
            output = self.model.read(memory, inputs_embeds[:, :-1], runs, pixels, output_hidden_states=wanted)
            memory.note_text(unread_BN.sum(1), length - 1 - first)
            model_kwargs["past_key_values"] = memory
            if wanted:
                model_kwargs["read_hidden_states"] = tuple(level[:, first:] for level in output.hidden_states)
        elif weights_are_sharded(self):  # Ranks that have media wait for this one to call as many layers.
            self.model.read(StateMemory(self.config), inputs_embeds[:, :0], [[] for _ in inputs_embeds], pixels)
        return model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args):
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} is for keys and values. Leave it out for a model with states."
            )
        generation_config.cache_implementation = None
        memory = StateMemory.of(model_kwargs.get("past_key_values"), self.config)
        memory.expand_rows(batch_size, _copies(generation_config))
        model_kwargs["past_key_values"] = memory
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, *args)


def _check_prefix(memory: StateMemory, read_BN: Tensor, mm_token_type_ids: Tensor | None) -> None:
    """Raises ValueError unless the part of a prompt that the memory has read names the media that it has seen.

    Without types that part may hold more starts, as those that a user or an answer wrote as text name nothing.
    """
    seen = [len(row) for row in memory.media] * (len(read_BN) if len(memory.media) == 1 else 1)
    named = item_starts(read_BN, mm_token_type_ids, sum(seen)).sum(1).tolist()
    if any(seen) and (any(map(int.__lt__, named, seen)) or (mm_token_type_ids is not None and named != seen)):
        raise ValueError(
            f"The memory has seen {seen} images and videos, but the part of the prompt that it has read names {named}. "
            "A prompt begins with one <|vision_start|><|vision_end|> for each video watched, as the chat template "
            "writes them, and continues as the conversation did."
        )
