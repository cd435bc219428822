"""What /metrics of a test's peer would answer now."""

from prometheus_client.parser import text_string_to_metric_families

from shoal.node.metrics import PREFIX
from tests.unit.node.node_samples import Peer


def read(peer: Peer, name: str, **labels: str) -> float:
    """One series."""
    for family in text_string_to_metric_families(peer.reporter.render_metrics().decode()):
        for sample in family.samples:
            if sample.name == PREFIX + name and sample.labels == labels:
                return float(sample.value)
    raise AssertionError(f"no series {name} {labels}")


def count_refused(peer: Peer, reason: str, plane: str) -> float:
    """How often something was refused for this reason."""
    return read(peer, "refusals_total", reason=reason, plane=plane)
