"""The engine: one tokenizer's decode as fast as the hardware allows (docs/engine.md).

Knows no family: each family's own ``engine/`` packs weights, tables what depends on time alone, and makes the program.
``decoder`` is what the user holds, ``graph_cache`` its CUDA graphs, ``bound_ops`` its ops.
"""

from msdd_fast.engine.decoder import FastDecoder, accelerate
from msdd_fast.engine.explain import Explanation, explain
from msdd_fast.engine.report import Report
from msdd_fast.layers.request import StageImages

__all__ = ["Explanation", "FastDecoder", "Report", "StageImages", "accelerate", "explain"]
