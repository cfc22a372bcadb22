"""Callable classes for ``ray.data.Dataset.map_batches`` (docs/bulk.md). They do not import Ray themselves.

ds.map_batches(Decoder, fn_constructor_kwargs={"checkpoint": "msdd-nano-256"}, batch_size=8,
               compute=ray.data.ActorPoolStrategy(size=4), num_gpus=1)
"""

from msdd_fast.integrations.ray.stages import Decoder, Encoder

__all__ = ["Decoder", "Encoder"]
