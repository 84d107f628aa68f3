"""Tiny random models that also see, each with a text part of a family that is folded, and one image for each."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

from tests.tiny import CONFIGS, tokenizer

IMAGE = 90  # the token that stands for a part of an image
SIZE = 28  # of an image, in pixels; four patches
_EYES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 14,
}
_CLIP = partial(tf.CLIPVisionConfig, **_EYES, projection_dim=16)
_SIGLIP = partial(tf.SiglipVisionConfig, **_EYES)
# The smallest of each way in which transformers holds a text part: with windows and a tied head, with a head of its
# own, under another name, with the head tied by the whole model alone, and with blocks of two kinds.
SEEING = {
    "gemma3": lambda: tf.Gemma3Config(
        text_config=CONFIGS["gemma3_text"](),
        vision_config=_SIGLIP(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=91,
        eoi_token_index=92,
    ),
    "llava": lambda: tf.LlavaConfig(
        text_config=CONFIGS["llama"](), vision_config=_CLIP(), image_token_index=IMAGE
    ),
    "smolvlm": lambda: tf.SmolVLMConfig(
        text_config=CONFIGS["llama"](), vision_config=dict(_EYES), image_token_id=IMAGE, scale_factor=2
    ),
    "internvl": lambda: tf.InternVLConfig(
        text_config=CONFIGS["qwen3"](),
        vision_config=_EYES | {"image_size": [SIZE, SIZE], "patch_size": [14, 14]},
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    ),
    "lfm2_vl": lambda: tf.Lfm2VlConfig(
        text_config=CONFIGS["lfm2"](),
        vision_config=tf.Siglip2VisionConfig(
            **{key: value for key, value in _EYES.items() if key != "image_size"}, num_patches=4
        ),
        image_token_id=IMAGE,
    ),
}
_IMAGE_TOKENS = {"gemma3": 4, "llava": 4, "smolvlm": 1, "internvl": 1}


@cache
def seeing_model(name: str) -> PreTrainedModel:
    """Weights large enough that the next token's distribution is far from uniform; frozen."""
    torch.manual_seed(0)
    model: PreTrainedModel = tf.AutoModelForImageTextToText.from_config(SEEING[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.requires_grad_(False)


def save_seeing(folder: Path, name: str, around: str = "$A") -> str:
    """The model, its tokenizer, and a file that says how images are read, as a folder that a study can name."""
    seeing_model(name).save_pretrained(folder)
    tokenizer(around).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    return str(folder)


def with_image(name: str) -> dict[str, Any]:
    """A text with one image in it, as the model takes both."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(3, IMAGE, (1, 20), generator=generator)
    words[0, 4 : 4 + _IMAGE_TOKENS[name]] = IMAGE
    pixels = torch.randn((1, 3, SIZE, SIZE), generator=generator)
    given = {"input_ids": words, "pixel_values": pixels[None] if name == "smolvlm" else pixels}
    return given | ({"token_type_ids": (words == IMAGE).long()} if name == "gemma3" else {})
