"""Store: a capture of a teacher on disk that describes itself. Keyed by sample id and token offset, never by row or step.

codec, hidden   what is kept of the teacher, as bytes       place     a folder here, or one behind a URL
top_k, sampled, quantized  codecs that lose some of it      entropy   integers to bits, by their frequencies
shard, offsets  the Parquet file that holds those bytes     manifest  what a capture says of itself
plan            which samples make up which shard           verify    whether a store is what it was
certificate     what a codec loses                      choose    how much it keeps, for a target
writer, reader  a capture being written, and being used     told      what a teacher told that is not here, as rows and a head
distillkit      what another toolkit captured
"""

from limbeck.store.codec import Codec, Exact
from limbeck.store.hidden import HiddenCodec
from limbeck.store.quantized import Quantized
from limbeck.store.sampled import SampledCodec
from limbeck.store.top_k import Nucleus, TopKCodec

__all__ = ["Codec", "Exact", "HiddenCodec", "Nucleus", "Quantized", "SampledCodec", "TopKCodec"]
