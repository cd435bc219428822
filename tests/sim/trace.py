"""What happened in a run: a hash over every message that was delivered, every effect and every fault."""

import hashlib

from shoal.protocol.messages import (
    ROUND_MESSAGES,
    Certified,
    Contribution,
    PartDone,
    Plan,
    Promise,
    Proposal,
    Vote,
    digest_record,
)

BATCH = 4096
TAIL = 4000  # lines that are kept for whoever reads a failure


class Trace:
    """Lines in, one digest out."""

    def __init__(self, verbose: bool) -> None:
        self.lines: list[str] = []
        self._verbose = verbose
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, line: str) -> None:
        self.lines.append(line)
        if len(self.lines) >= BATCH and not self._verbose:
            self._flush()

    def digest(self) -> str:
        if self._verbose:
            return hashlib.blake2b("".join(f"{line}\n" for line in self.lines).encode(), digest_size=16).hexdigest()
        self._flush()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        self._hash.update("".join(f"{line}\n" for line in self.lines).encode())
        self.lines.clear()


def describe(message: ROUND_MESSAGES) -> str:
    """One word for the kind, and what tells it from others of its kind."""
    name = type(message).__name__
    match message:
        case Certified():
            result = message.certificate.result
            return f"{name} {result.round}/{message.certificate.attempt} {digest_record(result)[:4].hex()}"
        case Proposal():
            return f"{name} {message.result.round}/{message.attempt} {digest_record(message.result)[:4].hex()}"
        case Plan():
            return f"{name} {message.round}/{message.attempt}.{message.revision} {len(message.roster)} {message.owners}"
        case PartDone():
            return f"{name} {message.round}/{message.attempt} {message.part} {message.digest[:4].hex()}"
        case Vote():
            return f"{name} {message.round}/{message.attempt} {message.result_digest[:4].hex()}"
        case Promise():
            accepted = message.accepted and digest_record(message.accepted)[:4].hex()
            return f"{name} {message.round}/{message.attempt} {message.accepted_attempt} {accepted}"
        case Contribution():
            return f"{name} {message.round} {message.digests[0][:4].hex()}"
    return f"{name} {getattr(message, 'round', '')}/{getattr(message, 'attempt', '')}"
