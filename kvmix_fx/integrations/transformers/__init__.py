"""transformers: cache classes for generate(), and what a compiled model does before each call.

A DynamicCache needs nothing: its plain layers are packed by the graph on their first step, and
every cache method then works on packed tensors. A StaticCache would allocate 16-bit buffers, so
its full-attention layers are exchanged for packed ones before they do.

On CUDA, generate() gets a packed cache of fixed capacity unless it is told otherwise: only such a cache
lets decode steps be replayed as CUDA graphs.

layers.py and caches.py: what holds the tokens. inputs.py: what is done to the arguments of a call. pool.py:
caches used again. generate.py: what is put in the place of the model's own methods.
"""

from kvmix_fx.integrations.transformers.caches import KVMixCache, KVMixStaticCache
from kvmix_fx.integrations.transformers.generate import transformers_hooks

__all__ = ["KVMixCache", "KVMixStaticCache", "transformers_hooks"]
