"""A model that also sees: its text part is folded as the family that it is, and put back into the whole.

transformers builds these models alike: the config has a `text_config`; the model has, made from that, the decoder of a
text model without its head, fed with embeddings of tokens and of images, and a head over it. So the text part is found
by its class, and the same modules under the name of the text model's own class are that model: Gemma 3's
`Gemma3ForConditionalGeneration` holds what a `Gemma3ForCausalLM` is made of. What is neither the decoder nor the head
(the vision tower, the projector) is called the *rest*. No weight of it is ever changed.

That the text part says of text what the whole model says is looked at, to the bit, before it is folded: PaliGemma, for
one, lets the tokens of a prompt see those that follow, and no text model does.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foldsearch.errors import ModelError, quote_error
from foldsearch.model.blocks import family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "check_text",
    "class_name",
    "copy_processor",
    "count_rest",
    "family_fault",
    "is_whole",
    "name_in",
    "put_back",
    "text_config",
    "text_part",
]

# What turns images and chats into tokens, beside a model: nothing of it depends on the blocks.
_PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
_ASKED_TOKENS = 24  # that the whole model and its text part must agree on


def is_whole(config: PretrainedConfig) -> bool:
    """Whether a config is of a model that reads images and text and writes text, and has a text part of its own."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    has_part = getattr(config, "text_config", None) is not None
    return has_part and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def class_name(config: PretrainedConfig) -> str:
    """The class of transformers that a whole model is of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type])


def name_in(folder: Path) -> str:
    """The class of the whole model in a folder."""
    from transformers import AutoConfig

    return class_name(AutoConfig.from_pretrained(folder))


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text part of a whole model, as the text model alone has it."""
    whole: Any = config
    part: Any = copy.deepcopy(whole.text_config)
    # Whether the head is the table of embeddings, and which tokens end an answer, the whole model says for its text.
    part.tie_word_embeddings = bool(getattr(whole, "tie_word_embeddings", False))
    if (stops := getattr(whole, "eos_token_id", None)) is not None:
        part.eos_token_id = stops
    found: PretrainedConfig = part
    return found


def family_fault(config: PretrainedConfig, error: ValueError) -> str:
    """Why the text part of a whole model cannot be folded.

    Args:
        config: of the text part.
        error: what `family_of` said of it.
    """
    positions = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" in positions:
        return (
            f"its text part, of the type '{config.model_type}', gives each token a position in time, height and width "
            "(M-RoPE), and foldsearch folds families whose tokens have one position. Give another model."
        )
    return f"it is folded by its text part. {error}"


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The text part of a whole model, as the text model of its family: the same modules, no weight is copied.

    Raises:
        ModelError: its text part is not found.
    """
    from transformers import AutoModelForCausalLM

    whole: Any = model
    config = text_config(whole.config)
    head, table = whole.get_output_embeddings(), whole.get_input_embeddings()
    config.tie_word_embeddings = head is not None and head.weight is table.weight
    with torch.device("meta"):
        text: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    setattr(text, text.base_model_prefix, whole.get_submodule(_place(whole, text)))
    text.set_output_embeddings(head)
    part: PreTrainedModel = text.eval()
    return part


def _place(whole: Any, text: PreTrainedModel) -> str:
    """The name of the module of a whole model that is the decoder of a text model."""
    kind = type(text.base_model)
    found = [name for name, module in whole.named_modules() if type(module) is kind]
    if len(found) != 1 or whole.get_output_embeddings() is None:
        raise ModelError(
            f"a model that also sees must hold the decoder of one text model and a head; a {type(whole).__name__} "
            f"holds {len(found)} of {kind.__name__}. Give another model."
        )
    return str(found[0])


@torch.no_grad()
def check_text(reference: str, model: PreTrainedModel, text: PreTrainedModel) -> None:
    """Whether a whole model says of text what its text part says alone, to the bit: only then can that be folded alone.

    Raises:
        ModelError: it does not, or does not read text without an image.
    """
    name, config = type(model).__name__, model.config
    marks = {value for key, value in config.to_dict().items() if key.endswith(("_token_id", "_token_index"))}
    tokens = [token for token in range(int(text.config.vocab_size)) if token not in marks]
    step = max(1, len(tokens) // _ASKED_TOKENS)
    ids_BT = torch.tensor([tokens[::step][:_ASKED_TOKENS]])
    remedy = "Give a text model, or another model that also sees."
    ours: Any = model
    theirs: Any = text
    try:
        whole_BTV = ours(input_ids=ids_BT, use_cache=False).logits
    except Exception as error:  # each class has checks of its own
        what = (
            f"{reference}: the text part of a {name} is folded by text alone, which the model does not read"
        )
        raise ModelError(quote_error(what, error, remedy)) from error
    if not torch.equal(whole_BTV, theirs(input_ids=ids_BT, use_cache=False).logits):
        raise ModelError(
            f"{reference}: the text part of a model that also sees is folded alone, so it must say of text what the "
            f"whole model says; that of this {name} says something else. {remedy}"
        )


def count_rest(config: PretrainedConfig) -> int:
    """Parameters of a whole model that are not of its text part; no weight is read.

    Raises:
        ModelError: its text part is not found.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    of_text = {id(parameter) for parameter in text_part(model).parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in of_text)


def put_back(text: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The whole model with another text part: that of `folder`, whose rest is taken as it is, in the text's dtype.

    Args:
        text: a stock model of the family, which may have fewer blocks; its modules become the whole model's.
        folder: of the whole model that the text part came from.

    Raises:
        ModelError: it cannot be read any more.
    """
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    try:
        whole: Any = auto.from_pretrained(folder, dtype=text.dtype)
    except Exception as error:
        raise ModelError(
            quote_error(f"the model in {folder}, whose text part was folded, cannot be read", error)
        ) from error
    source: Any = text
    assert family_of(text.config).stock == type(text).__name__, "a folded model has no place in a stock one"
    whole.set_submodule(_place(whole, text), source.base_model)
    whole.set_output_embeddings(source.get_output_embeddings())
    whole.config.text_config = copy.deepcopy(text.config)
    whole.config.tie_word_embeddings = bool(text.config.tie_word_embeddings)
    whole.generation_config = copy.deepcopy(source.generation_config)
    model: PreTrainedModel = whole.requires_grad_(False).eval()
    return model


def copy_processor(folder: Path, target: Path) -> None:
    """Copy what turns images and chats into tokens from beside a whole model, where `target` has no such file yet."""
    for name in _PROCESSOR_FILES:
        if (folder / name).is_file() and not (target / name).exists():
            shutil.copyfile(folder / name, target / name)
