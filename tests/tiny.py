"""Tiny random models of every family, a tokenizer of words, and folders of text."""

from __future__ import annotations

import random
from functools import cache, partial
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from foldsearch.model.measure import measure
from foldsearch.model.tokens import TokenSet
from foldsearch.plan.cost import CostTable
from foldsearch.plan.plan import FoldPlan

VOCABULARY, WIDTH, NUM_BLOCKS, WINDOW = 96, 32, 5, 9
# dropping a block shifts this list against itself
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = {**COMMON, "intermediate_size": 40, "num_key_value_heads": 2}
MIXED_LLAMA = {**LLAMA, "sliding_window": WINDOW, "layer_types": TYPES}
CONFIGS = {
    "llama": partial(tf.LlamaConfig, **LLAMA),
    "mistral": partial(tf.MistralConfig, **LLAMA, sliding_window=WINDOW),
    "qwen2": partial(tf.Qwen2Config, **MIXED_LLAMA, use_sliding_window=True),
    "qwen3": partial(tf.Qwen3Config, **MIXED_LLAMA, head_dim=12, use_sliding_window=True),
    "smollm3": partial(tf.SmolLM3Config, **LLAMA),  # the fourth block does not turn by position
    "granite": partial(
        tf.GraniteConfig,
        **LLAMA,
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        attention_multiplier=0.3,
        logits_scaling=1.3,
    ),
    "stablelm": partial(tf.StableLmConfig, **LLAMA, partial_rotary_factor=0.5, use_qkv_bias=True),
    "gemma": partial(tf.GemmaConfig, **LLAMA, head_dim=8),
    "gemma2": partial(tf.Gemma2Config, **MIXED_LLAMA, head_dim=8, final_logit_softcapping=3.0),
    "gemma3_text": partial(tf.Gemma3TextConfig, **MIXED_LLAMA, head_dim=12),
    "phi3": partial(tf.Phi3Config, **LLAMA, sliding_window=None),
    "lfm2": partial(
        tf.Lfm2Config,
        **LLAMA,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "full_attention", "full_attention", "conv"],
    ),
    "qwen3_moe": partial(
        tf.Qwen3MoeConfig,
        **LLAMA,
        head_dim=12,
        moe_intermediate_size=16,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "olmo2": partial(tf.Olmo2Config, **LLAMA),
    "gpt2": partial(tf.GPT2Config, **COMMON),
    "gpt_neox": partial(tf.GPTNeoXConfig, **COMMON, intermediate_size=40),
    "opt": partial(tf.OPTConfig, **COMMON, ffn_dim=40, word_embed_proj_dim=WIDTH),
}

EXPERTS = ("qwen3_moe",)  # whose MLPs run at no other position
SHARING = [name for name in CONFIGS if name not in EXPERTS]


@cache
def price_table(name: str = "llama") -> CostTable:
    """Of a family's tiny model; a trace takes a second."""
    return measure(CONFIGS[name]())


def can_fold(name: str, text: str) -> bool:
    """Whether a family's blocks can do what a plan asks of them, by the price's table."""
    return price_table(name).can_fold(FoldPlan.parse(text, NUM_BLOCKS))


@cache
def dense_model(name: str = "llama") -> PreTrainedModel:
    """Weights large enough that the next token's distribution is far from uniform; frozen."""
    torch.manual_seed(0)
    model: PreTrainedModel = tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.requires_grad_(False)


def token_set(name: str = "search", sequences: int = 6, length: int = 16, seed: int = 0) -> TokenSet:
    """Random tokens, two sequences a document."""
    ids_NT = torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))
    documents = tuple(f"{name}{index}" for index in range((sequences + 1) // 2))
    return TokenSet(name, ids_NT, torch.arange(sequences) // 2, documents)


def as_tokens(ids_NT: torch.Tensor, front: int = 0) -> TokenSet:
    """Token ids as one document's; the first `front` of each sequence are none of its text."""
    text_NT = torch.arange(ids_NT.shape[-1]).expand(ids_NT.shape) >= front
    return TokenSet("search", ids_NT, torch.zeros(len(ids_NT), dtype=torch.int64), ("",), text_NT)


def tokenizer(around: str = "$A") -> PreTrainedTokenizerFast:
    """Token i is the word "wi", for i of 3 and above; around a text it puts what the template says ("<s> $A")."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = [(token, words[token]) for token in ("<s>", "</s>")]
    built.post_processor = processors.TemplateProcessing(around, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=built, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save_model(folder: Path, name: str = "llama", around: str = "$A") -> str:
    """The dense model and its tokenizer as a folder that a study can name."""
    dense_model(name).save_pretrained(folder)
    tokenizer(around).save_pretrained(folder)
    return str(folder)


def write_corpus(folder: Path, documents: int = 60, words: int = 50, seed: int = 0) -> str:
    """A folder of text files in which a word often follows from the one before, so that there is something to learn."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for index in range(documents):
        word, text = rng.randrange(3, VOCABULARY), []
        for _ in range(words):
            text.append(f"w{word}")
            word = (
                3 + (word * 5 + 1) % (VOCABULARY - 3) if rng.random() < 0.8 else rng.randrange(3, VOCABULARY)
            )
        (folder / f"{index:03}.txt").write_text(" ".join(text), encoding="utf-8")
    return str(folder)


class LogitRows(TorchDispatchMode):
    """While it is entered: the most rows of any tensor over the vocabulary that an operation gave."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY:
                self.most = max(self.most, tensor.numel() // VOCABULARY)
        return outputs
