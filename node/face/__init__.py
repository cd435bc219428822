"""What `import shoal` offers: `attach`, which joins a training script of one's own to the running daemon.

This folder is installed as `shoal` itself (package-dir in pyproject.toml), beside shoal.node, shoal.protocol and the
others, which are folders of their own in the repository.

Invariant: importing it imports nothing else, so that whoever needs shoal.protocol alone does not pay for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.node.training.attachment import Attachment as Attachment
    from shoal.node.training.attachment import attach as attach

__all__ = ["Attachment", "attach"]


def __getattr__(name: str) -> Any:
    """Called for what is not imported yet (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    from shoal.node.training import attachment

    return getattr(attachment, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
