"""How far apart two numbers may be that are equal on paper, and why.

The kernels of AVX2, AVX-512, AMX and plain processors, and one or two threads, add the same products in another order,
so equal things differ by rounding: 6e-8 of a number's size in float32 for each step on the way. Tiny models have logits
of up to 10 and a few hundred steps. On every kind of processor that could be tried (ATEN_CPU_CAPABILITY default, avx2
and the machine's own, 1 and 2 threads) no test used more than a tenth of its tolerance; what each of them guards
against (a wrong block, a forgotten bias or norm) moves logits by more than 0.01.
"""

from __future__ import annotations

# The same float32 operations in another order, or on another part of the batch.
REORDERED = {"atol": 1e-5, "rtol": 1e-5}
# Other float32 operations that give the same: token by token with a cache, an adapter merged into its weight, a block
# written out by hand.
OTHER_WAY = {"atol": 1e-4, "rtol": 1e-4}
# Solutions of linear systems and truncated SVDs of float32 data, computed in float64: what rounded the data, 6e-8,
# grows by the root of the condition, up to 1e3 in these tests.
SOLVED = {"atol": 1e-4, "rtol": 1e-4}
# A KL of nothing: the difference of two sums of size 5, each right to 6e-8 a step.
NO_KL = 1e-6
# Log-probabilities of another program (llama.cpp) from the same 32-bit weights: 5e-6 was seen.
RUNTIME = 1e-4
# The same where its GELU is a table of 16-bit values: 2e-3 was seen.
RUNTIME_GELU = 2e-2
# The same beside weights in 16 bits and fewer, where llama.cpp rounds what goes into a product to 16 or 8 bits.
RUNTIME_ROUNDED = 0.1
