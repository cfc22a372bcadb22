"""The engine: one tokenizer's decode as fast as the hardware allows (docs/engine.md).

``weights`` packs, ``tables`` hoists what depends on time alone, ``network`` evaluates the velocity, ``program`` is the
whole decode; SSDD has files of its own for these (``ssdd_weights`` and so on), and ``family`` knows which to take.
``graphs`` captures it, ``fast_decoder`` is what the user holds.
"""

from msdd_fast.engine.decoder import FastDecoder, accelerate
from msdd_fast.engine.explain import Explanation, explain
from msdd_fast.engine.report import Report
from msdd_fast.layers.request import StageImages

__all__ = ["Explanation", "FastDecoder", "Report", "StageImages", "accelerate", "explain"]
