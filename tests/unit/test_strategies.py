"""Every draft in docs/strategies.md makes a manifest."""

import re
from pathlib import Path

import pytest

from shoal.protocol.layout import TensorSpec, make_layout
from shoal.protocol.manifest import make_manifest, parse_draft
from tests.unit.protocol.samples import PEERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
DRAFTS = re.findall(r"^## (.*?)$.*?^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", [text for _, text in DRAFTS], ids=[name.split(",")[0] for name, _ in DRAFTS])
def test_a_draft_of_the_page_makes_a_manifest(text: str) -> None:
    draft = parse_draft(f'name = "x"\nseed = 1\n[task]\nkind = "byte_gpt"\n{text}', "{}")
    layout = make_layout((TensorSpec(name="blocks.0.weight", shape=(1024, 1024)),))
    assert make_manifest(draft, layout, PEERS[0], PEERS[:1]).rounds == draft.rounds


def test_the_page_has_a_draft_for_each_of_its_sections() -> None:
    assert [name for name, _ in DRAFTS] == re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
