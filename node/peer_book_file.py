"""The peer book on the disk: a node that has ever been in the swarm comes back without any bootstrap peer."""

import logging
from pathlib import Path

from shoal.dht.peer_book import PeerBook, decode_peer_book_untrusted
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId

PEER_BOOK_FILE = "peers.book"  # in the data folder

log = logging.getLogger(__name__)


def load_peer_book(path: Path, me: PeerId) -> PeerBook:
    """The stored book; an empty one where there is none, or where it is damaged."""
    try:
        return decode_peer_book_untrusted(path.read_bytes(), me)
    except FileNotFoundError:
        return PeerBook(me)
    except OSError as error:
        log.warning("%s cannot be read and is begun anew: %s", path, error)
        return PeerBook(me)
    except ProtocolError as error:
        log.warning("%s is damaged and is begun anew: %s", path, error)
        return PeerBook(me)


def save_peer_book(path: Path, encoded: bytes) -> None:
    """Replace the stored book. Blocking; one call at a time. A disk that fails costs the book and nothing else."""
    temporary = path.with_suffix(".partial")
    try:
        temporary.write_bytes(encoded)
        temporary.replace(path)
    except OSError as error:
        log.warning("the peer book was not saved, the next start may need a bootstrap peer: %s", error)
