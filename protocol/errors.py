"""The exception tree and the closed vocabulary of reasons.

ShoalError
    ProtocolError     a peer's misbehaviour: costs that peer, never us; carries a `Refusal`
    InputError        a person's input: names the field and the fix
        ConfigError, ManifestError, UriError

A reason reads the same in the log, in the metrics and in `shoal status`: the value of the enum is that text.
"""

from enum import StrEnum


class Refusal(StrEnum):
    """Why something from outside was refused."""

    MALFORMED = "malformed"
    OVERSIZED = "oversized"
    NON_CANONICAL = "non_canonical"
    UNKNOWN_TYPE = "unknown_type"
    BAD_SIGNATURE = "bad_signature"
    WRONG_PEER = "wrong_peer"
    WRONG_SWARM = "wrong_swarm"
    WRONG_VERSION = "wrong_version"
    WRONG_BASE = "wrong_base"
    WRONG_ROUND = "wrong_round"
    WRONG_ATTEMPT = "wrong_attempt"
    WRONG_PROPOSER = "wrong_proposer"
    WRONG_LENGTH = "wrong_length"
    WRONG_DIGEST = "wrong_digest"
    NOT_A_MEMBER = "not_a_member"
    NOT_PLANNED = "not_planned"
    NOT_FINITE = "not_finite"
    OUT_OF_RANGE = "out_of_range"
    DUPLICATE = "duplicate"
    REPLAYED = "replayed"
    MISSING_DEPENDENCY = "missing_dependency"
    EQUIVOCATION = "equivocation"
    EXPIRED = "expired"
    NO_QUORUM = "no_quorum"
    LIMIT = "limit"
    NOT_AUTHENTIC = "not_authentic"
    NOT_READY = "not_ready"
    OTHER_LOG = "other_log"
    BANNED = "banned"
    BUDGET_SPENT = "budget_spent"
    NOT_ADMITTED = "not_admitted"


class Failure(StrEnum):
    """Why an attempt ended without a certificate, or why a peer went on without one; expected events."""

    PROPOSER_LOST = "proposer_lost"
    PROPOSER_SILENT = "proposer_silent"
    PROPOSER_ABSTAINS = "proposer_abstains"
    EXCHANGE_TIMEOUT = "exchange_timeout"
    COMMIT_TIMEOUT = "commit_timeout"
    NO_QUORUM = "no_quorum"
    UPDATE_LOST = "update_lost"
    TOO_FEW_READY = "too_few_ready"
    OWNER_LOST = "owner_lost"
    OWNER_SLOW = "owner_slow"
    SENDER_LOST = "sender_lost"
    SENDER_SLOW = "sender_slow"
    SUPERSEDED = "superseded"
    PEER_LEFT = "peer_left"
    PEER_LOST = "peer_lost"
    PEER_UNSEEN = "peer_unseen"
    NO_PARTNER = "no_partner"
    PARTNER_LOST = "partner_lost"
    DONOR_FAILED = "donor_failed"
    TRAINER_CRASHED = "trainer_crashed"
    TRAINER_STALLED = "trainer_stalled"
    BOOTSTRAP_UNREACHABLE = "bootstrap_unreachable"
    CLOCK_SKEW = "clock_skew"
    DISK_FULL = "disk_full"
    PEER_UNREACHABLE = "peer_unreachable"
    PEER_SLOW = "peer_slow"
    STORE_DAMAGED = "store_damaged"
    STORE_FOREIGN = "store_foreign"
    STORE_IN_USE = "store_in_use"
    STORE_UNUSABLE = "store_unusable"
    STORE_BEHIND = "store_behind"
    VOTES_FORGOTTEN = "votes_forgotten"
    CHAIN_UNCONFIRMED = "chain_unconfirmed"
    CHAIN_CLONED = "chain_cloned"
    CHAIN_FORKED = "chain_forked"
    PUNCH_TIMEOUT = "punch_timeout"
    PUNCH_REFUSED = "punch_refused"
    PUNCH_PAUSED = "punch_paused"
    NO_OBSERVED_ADDRESS = "no_observed_address"
    NO_GATEWAY = "no_gateway"
    GATEWAY_SILENT = "gateway_silent"
    GATEWAY_REFUSED = "gateway_refused"
    GATEWAY_MALFORMED = "gateway_malformed"
    PORT_TAKEN = "port_taken"
    DOUBLE_NAT = "double_nat"
    MULTICAST_UNAVAILABLE = "multicast_unavailable"
    NO_RELAY = "no_relay"
    RELAY_REFUSED = "relay_refused"
    RELAY_LOST = "relay_lost"
    RELAY_TIMEOUT = "relay_timeout"
    RELAY_PAUSED = "relay_paused"
    RELAY_HALF_OPEN = "relay_half_open"
    RELAY_IDLE = "relay_idle"
    RELAY_EXPIRED = "relay_expired"
    BUDGET_SPENT = "budget_spent"


class ShoalError(Exception):
    """The root of every error that this project raises on purpose."""


class ProtocolError(ShoalError):
    """A peer sent something that it must not send."""

    def __init__(self, refusal: Refusal, detail: str) -> None:
        super().__init__(f"{refusal}: {detail}")
        self.refusal = refusal
        self.detail = detail


class InputError(ShoalError):
    """A person's input that cannot be used: `field` says where, `fix` says what to do."""

    def __init__(self, field: str, problem: str, fix: str) -> None:
        super().__init__(f"{field}: {problem}. Fix: {fix}")
        self.field = field
        self.problem = problem
        self.fix = fix


class ConfigError(InputError):
    """The node's configuration file or a command-line option."""


class ManifestError(InputError):
    """A swarm's manifest."""


class UriError(InputError):
    """A shoal:// URI or a multiaddr."""
