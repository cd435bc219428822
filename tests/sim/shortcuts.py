"""Pure functions of the production code that the simulator asks the same thing of again and again, remembered.

Every peer of a world decodes the same update, on purpose: it is the same bytes. What a function returned once for some
bytes it returns again; what it refused it is asked anew.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from shoal.protocol.codecs import CODECS, Codec, Encoded, Float32s

DECODED_MAX = 256  # parts


class RememberingCodec:
    """A codec that knows what some bytes decode to."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._decoded: OrderedDict[tuple[bytes, int], Float32s] = OrderedDict()
        self.name = codec.name
        self.magnitude_max = codec.magnitude_max
        self.is_sparse = codec.is_sparse
        self.block_elements = codec.block_elements
        self.encoded_bytes = codec.encoded_bytes
        self.encode = codec.encode
        self.encode_range = codec.encode_range
        self.split_range = codec.split_range
        self.add_range = codec.add_range

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        self._look_up(raw, elements)

    def decode_untrusted(self, raw: Encoded, elements: int, out: Float32s) -> None:
        np.copyto(out, self._look_up(raw, elements))

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        if isinstance(raw, bytes) and (known := self._decoded.get((raw, elements))) is not None:
            np.copyto(out, known[start : start + out.size])
        else:
            self._codec.decode_range(raw, elements, start, out)

    def _look_up(self, raw: Encoded, elements: int) -> Float32s:
        key = bytes(raw), elements
        known = self._decoded.get(key)
        if known is None:
            known = np.empty(elements, np.float32)
            self._codec.decode_untrusted(raw, elements, known)
            if len(self._decoded) >= DECODED_MAX:
                self._decoded.popitem(last=False)
            self._decoded[key] = known
        return known


_remembering: dict[str, Codec] = {name: RememberingCodec(codec) for name, codec in CODECS.items()}


@contextmanager
def in_use() -> Iterator[None]:
    """Put them in the places of the originals for as long as this lasts."""
    originals = dict(CODECS)
    CODECS.update(_remembering)
    try:
        yield
    finally:
        CODECS.update(originals)
