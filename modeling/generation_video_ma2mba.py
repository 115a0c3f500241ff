"""What `generate` does differently for Video-Ma2mba: the prompt is read once, before rows are repeated.

What is unusual: transformers would pass the media to the first forward pass, on inputs already repeated for beams or
samples. We use its hook for encoders instead: all of the prompt but its last token goes into a `StateMemory`, and
generation starts from there. It cannot go on without one, so `use_cache=False` changes nothing.
"""

import torch
from torch import Tensor
from transformers import GenerationMixin

from .frame_streaming import to_device
from .graphed_decoding import GraphedDecoding
from .media import MediaItem, item_starts, list_media, without_seen_grids
from .media_stream import media_of_rows, runs_of
from .ranks import weights_are_sharded
from .state_memory import StateMemory


_PIXELS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class VideoMa2mbaGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model whose `model` is a `VideoMa2mbaModel`."""

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        """After the prompt every row reads every token: padding is behind it, and no mask has to grow any more."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration:
            inputs.pop("read_hidden_states", None)
        if next_sequence_length == 1 and not is_first_iteration:
            inputs.pop("attention_mask", None)
        return inputs

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """Whether tokens are decoded by `get_compiled_call`: transformers asks that of a cache of keys and values."""
        if generation_config.disable_compile or generation_config.compile_config is not None:
            return super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        quantizer = getattr(self, "hf_quantizer", None)
        watched = GraphedDecoding.is_watched(self) or weights_are_sharded(self)  # or gathers them from other processes
        return GraphedDecoding.suits(self) and not watched and (quantizer is None or quantizer.is_compileable)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        generation_config.use_cache = True
        pixels, grids = ({kind: model_kwargs.pop(names[i], None) for kind, names in _PIXELS.items()} for i in (0, 1))
        memory = StateMemory.of(model_kwargs.get("past_key_values"), self.config)
        grids = without_seen_grids(pixels, grids, memory.media)
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("A prompt is padded on the right, where its answer begins: pad with padding_side='left'.")
        length = inputs_tensor.shape[1]
        total = (
            getattr(generation_config, "_mask_length", length) if attention_mask is None else attention_mask.shape[1]
        )
        first = memory.text_length if total == length else 0  # tokens of the prompt that the memory has read
        if first >= length:
            raise ValueError(
                f"The memory has read {first} tokens of text and the prompt has {length}. A prompt is the whole "
                "conversation: one <|vision_start|><|vision_end|> for each video watched, then the question."
            )
        if inputs_tensor.is_floating_point():
            input_ids, inputs_embeds = None, inputs_tensor
        else:
            input_ids, inputs_embeds = inputs_tensor, self.get_input_embeddings()(to_device(inputs_tensor, self.device))
        starts_BN = self.model.media_starts(input_ids, inputs_embeds).to(inputs_embeds.device)
        unread_BN = torch.zeros_like(starts_BN)
        unread = memory.unread(attention_mask, inputs_embeds[:, first:])
        unread_BN[:, first:] = True if unread is None else unread.to(unread_BN.device)
        if total == length:
            _check_prefix(memory, starts_BN & ~unread_BN, model_kwargs.get("mm_token_type_ids"))
        images, videos = (list_media(kind, pixels[kind], grids[kind]) for kind in _PIXELS)
        if images or videos:
            types = model_kwargs.get("mm_token_type_ids")
            rows, starts_BN = _unread_media(images, videos, starts_BN, unread_BN, types)
            if starts_BN[:, -1].any():
                raise ValueError("The prompt ends with <|vision_start|>; write <|vision_end|> after it.")
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
        elif weights_are_sharded(self):  # other ranks may have media, and wait for this one to call as many layers
            self.model.read(StateMemory(self.config), inputs_embeds[:, :0], [[] for _ in inputs_embeds], pixels)
        return model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args):
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind!r} is for keys and values; this model has a state instead.")
        generation_config.cache_implementation = None
        memory = StateMemory.of(model_kwargs.get("past_key_values"), self.config)
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        memory.expand_rows(batch_size, copies)
        model_kwargs["past_key_values"] = memory
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, *args)


def _unread_media(
    images, videos, starts_BN: Tensor, unread_BN: Tensor, mm_token_type_ids: Tensor | None
) -> tuple[list[list[MediaItem]], Tensor]:
    """The items of each row that the memory has not seen, and where they start; all of the prompt's may be given."""
    count = len(images) + len(videos)
    all_BN = item_starts(starts_BN, mm_token_type_ids, count)
    if count == int(all_BN.sum()):
        rows, new_BN = media_of_rows(images, videos, all_BN, mm_token_type_ids), all_BN & unread_BN
        return [row[len(row) - new :] for row, new in zip(rows, new_BN.sum(1).tolist())], new_BN
    new_BN = item_starts(starts_BN & unread_BN, mm_token_type_ids, count)
    return media_of_rows(images, videos, new_BN, mm_token_type_ids), new_BN


def _check_prefix(memory: StateMemory, read_BN: Tensor, mm_token_type_ids: Tensor | None) -> None:
    """Raises ValueError unless what the memory has read of a prompt names what it has seen.

    Starts that are typed 0, or that an answer held, name nothing: without types there may be more than was seen.
    """
    seen = [len(row) for row in memory.media] * (len(read_BN) if len(memory.media) == 1 else 1)
    typed = item_starts(read_BN, mm_token_type_ids, sum(seen))
    named = typed.sum(1).tolist()
    if any(seen) and (any(map(int.__lt__, named, seen)) or (mm_token_type_ids is not None and named != seen)):
        raise ValueError(
            f"The memory has seen {seen} images and videos, and the part of the prompt that it has read names {named}: "
            "a prompt begins with one <|vision_start|><|vision_end|> for each video watched, as the chat template "
            "writes them, and then goes on as the conversation did."
        )
