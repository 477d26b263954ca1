"""Store: a capture of a teacher on disk that describes itself. Keyed by sample id and token offset, never by row or step.

codec, hidden   what is kept of the teacher, as bytes       place    a folder here, or one behind a URL
shard           the Parquet file that holds those bytes     manifest what a capture says of itself
writer, reader  a capture being written, and being used     verify   whether it is what it was
"""

from limbeck.store.codec import Codec, Exact

__all__ = ["Codec", "Exact"]
