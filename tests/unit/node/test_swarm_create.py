"""What `shoal swarm create` tells a founder to run next."""

from pathlib import Path

import pytest

from shoal.node.swarm_create import describe_needs

DIGEST = "blake3:" + "ab" * 32


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("byte_gpt", {"width": 8}, ()),
        ("custom", {"path": "a.b:C"}, ("--allow-task", "a.b:C")),
        ("causal_lm", {"tokenizer": "bytes"}, ()),
        ("causal_lm", {"tokenizer": "t.json"}, ("--tokenizer", "drafts/t.json")),
        (
            "causal_lm",
            {"weights": "gpt2", "tokenizer": "gpt2/tokenizer.json"},
            ("--weights", "drafts/gpt2", "--tokenizer", "drafts/gpt2/tokenizer.json"),
        ),
        ("causal_lm", {"weights": DIGEST, "tokenizer": DIGEST}, ("--weights", "FOLDER", "--tokenizer", "FILE")),
    ],
)
def test_the_command_to_start_names_the_files_of_the_task(
    kind: str, options: dict[str, object], expected: tuple[str, ...]
) -> None:
    assert describe_needs(kind, options, Path("drafts")) == expected
