"""The tokenizer of a GGUF file, in the form that transformers reads.

The rules are those of llama.cpp (src/llama-vocab.cpp): which tokens stand at the beginning and the end of a text when
the file does not say it, how text is cut before its pieces are merged, when a space is put in front.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from foldsearch.errors import ModelError, quote_error
from foldsearch.model.gguf.file import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = ["build_tokenizer", "GPT2_SPLIT", "ways_to_cut"]

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_SPACE = "\u2581"  # what SentencePiece writes for a space

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LETTERS_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _LETTERS_ENDS
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _LETTERS_ENDS
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    + _CASED_ENDS
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}" + _CASED_ENDS
)
# How a byte-level vocabulary cuts text, by tokenizer.ggml.pre: each expression cuts what those before it left.
_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat", "a.x-4.0", "mellum", "trillion"), (GPT2_SPLIT,)
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (r"\p{N}", GPT2_SPLIT),
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "dbrx", "smaug-bpe"), (_LLAMA3,)
    ),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"), (_QWEN2,)
    ),
    "qwen35": (_QWEN35,),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (_GPT4O,)),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2_SPLIT, "[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"),
}  # fmt: skip
# Vocabularies in which a whole piece that is a token is taken as it is, and those that begin a text with a token.
_WHOLE_PIECES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "tekken"}


def ways_to_cut() -> tuple[tuple[str, tuple[str, ...], bool], ...]:
    """The ways to cut text: a name, its expressions, and whether a piece that is a token is taken as it is."""
    found: dict[tuple[tuple[str, ...], bool], str] = {}
    for name, splits in _SPLITS.items():
        found.setdefault((splits, name in _WHOLE_PIECES), name)
    # The best known name of a way stands first in the list, but for Llama 3's.
    return tuple(
        ("llama-bpe" if name == "llama3" else name, splits, whole) for (splits, whole), name in found.items()
    )


def build_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast | None:
    """The file's tokenizer: `tokenizer(text)` begins and ends a text as the file says; None if it holds none.

    Raises:
        ModelError: the file's tokenizer is of a kind that is not known here, or its parts do not fit together.
    """
    from transformers import PreTrainedTokenizerFast

    metadata = file.metadata
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if model in (None, "none", "no_vocab") or not tokens:
        return None
    words = _unique(tokens)
    try:
        if model == "llama":
            backend = _sentencepiece(file, words)
        elif model == "gpt2":
            backend = _byte_level(file, words)
        else:
            raise ModelError(
                f"{file.path}: its tokenizer (tokenizer.ggml.model) must be 'llama' or 'gpt2'; got {model!r}. Give the "
                "model as a folder of transformers, with its tokenizer.json."
            )
    except ModelError:
        raise
    except Exception as error:  # the library raises plain exceptions
        what = f"{file.path}: its tokenizer cannot be built"
        raise ModelError(quote_error(what, error, "Fetch the file again.")) from error
    special = _special_tokens(file, words)
    _mark_tokens(backend, metadata.get("tokenizer.ggml.token_type"), words, special.values())
    _frame_texts(file, backend, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        **special,
    )


def _unique(tokens: list[str]) -> list[str]:
    """The tokens by id, each of its own: of equal ones the last keeps the name, as in llama.cpp."""
    last = {token: index for index, token in enumerate(tokens)}
    return [
        token if token and last[token] == index else f"[UNNAMED_{index}]"
        for index, token in enumerate(tokens)
    ]


def _sentencepiece(file: GgufFile, words: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(words):
        raise ModelError(
            f"{file.path}: its tokenizer has {len(words)} tokens and needs as many tokenizer.ggml.scores; got "
            f"{len(scores) if isinstance(scores, list) else 'none'}. Fetch the file again, or convert it anew."
        )
    vocabulary = {word: index for index, word in enumerate(words)}
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_by_score(vocabulary, scores),
            unk_token=words[unknown] if unknown < len(words) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: Any = normalizers.Replace(" ", _SPACE)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        # in front of a text, and again after each special token inside it: what lies between them is normalised alone
        spaces = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(content=" ", left=1))
    backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the one with the best score first.

    SentencePiece always merges the two neighbours that make the token with the best score, wherever they are; as a list
    of merges that is every way to make a token, ordered by that token's score.
    """
    merges: list[tuple[float, int, int, str, str]] = []
    for word, index in vocabulary.items():
        for cut in range(1, len(word)):
            left, right = word[:cut], word[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _byte_level(file: GgufFile, words: list[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = file.metadata.get("tokenizer.ggml.pre") or "default"
    if name not in _SPLITS:
        raise ModelError(
            f"{file.path}: how its tokenizer cuts text (tokenizer.ggml.pre = {name!r}) is not known here; known: "
            f"{', '.join(sorted(_SPLITS))}. Give the model as a folder of transformers, with its tokenizer.json."
        )
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelError(
            f"{file.path}: its tokenizer needs tokenizer.ggml.merges, and the file has none. Fetch it again."
        )
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1)  # a piece may itself begin with a space
        pairs.append((merge[:cut], merge[cut + 1 :]))
    backend = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=pairs,
            ignore_merges=name in _WHOLE_PIECES,
        )
    )
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in _SPLITS[name]),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _special_tokens(file: GgufFile, words: list[str]) -> dict[str, str]:
    """The words of the begin, end, unknown and padding token, with llama.cpp's ids where the file names none."""
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if file.metadata["tokenizer.ggml.model"] == "llama" else {}
    found = {}
    for key, name in (
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("unknown", "unk_token"),
        ("padding", "pad_token"),
    ):
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id", defaults.get(key))
        if index is None:
            continue
        if not 0 <= index < len(words):
            raise ModelError(
                f"{file.path}: tokenizer.ggml.{key}_token_id must be one of its {len(words)} tokens; got {index}. "
                "The file is damaged, or was converted wrongly: fetch it again."
            )
        found[name] = words[index]
    return found


def _mark_tokens(
    backend: Tokenizer, kinds: list[int] | None, words: list[str], special: Iterable[str]
) -> None:
    """Control tokens and those of the user stay whole in any text."""
    from tokenizers import AddedToken

    whole = set(special)
    for kind, word in zip(kinds or [], words, strict=False):
        if kind == _CONTROL:
            whole.add(word)
    backend.add_special_tokens(
        [AddedToken(word, normalized=False, special=True) for word in words if word in whole]
    )
    backend.add_tokens(
        [
            AddedToken(word, normalized=False, special=False)
            for kind, word in zip(kinds or [], words, strict=False)
            if kind == _USER_DEFINED and word not in whole
        ]
    )


def _frame_texts(file: GgufFile, backend: Tokenizer, special: dict[str, str]) -> None:
    """Put the begin and the end token around a text, where the file wants them."""
    from tokenizers import processors

    metadata = file.metadata
    begins = (
        metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _WHOLE_PIECES
    )
    frame = []
    for name, key, wanted in (("bos_token", "add_bos_token", begins), ("eos_token", "add_eos_token", False)):
        if not metadata.get(f"tokenizer.ggml.{key}", wanted):
            frame.append("")
        elif name in special:
            frame.append(special[name])
        else:
            raise ModelError(
                f"{file.path}: its texts {'begin' if name == 'bos_token' else 'end'} with a token "
                f"(tokenizer.ggml.{key}), but the file does not say with which. Convert the model anew."
            )
    first, last = frame
    parts = [part for part in (first, "$A", last) if part]
    pair = [*parts, *(part for part in (first, "$B:1", last) if part)]
    ids = [(word, backend.token_to_id(word)) for word in dict.fromkeys(frame) if word]
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(parts), pair=" ".join(pair), special_tokens=ids
    )
