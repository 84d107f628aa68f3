"""Read GGUF files, the format of llama.cpp: the header, the tokenizer, the config and the weights.

Everything is read here and not by transformers, because its reader leaves out what it does not know (scaled RoPE,
windows, soft caps, biases) without a word. The rule of this package: what the file says is applied, or it is an error
that names the key or the tensor.
"""
