"""The live page's script on a whole status, in Node.js with as much of a browser as it needs."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.node import web
from shoal.node.status import Status

STATIC = Path(web.__file__).parent / "static"
# What the script uses of a browser; at the end the text of each element that it has drawn goes to standard output.
BROWSER = """
class Element {
  constructor() {
    Object.assign(this, { children: [], own: "", style: {}, hidden: false, clientWidth: 600, clientHeight: 200 });
  }
  get textContent() {
    return [this.own, ...this.children.map((one) => one.textContent ?? one)].filter(Boolean).join(" ");
  }
  set textContent(text) { this.own = String(text); this.children = []; }
  append(...more) { this.children.push(...more); }
  replaceChildren(...all) { this.own = ""; this.children = all; }
  setAttribute() {}
  addEventListener() {}
}
const elements = {}, listeners = {};
globalThis.document = {
  getElementById: (id) => (elements[id] ??= new Element()),
  createElement: () => new Element(),
  createElementNS: () => new Element(),
};
globalThis.EventSource = class { addEventListener(kind, listener) { listeners[kind] = listener; } };
globalThis.ResizeObserver = class { observe() {} };
process.stdin.setEncoding("utf8");
let given = "";
for await (const piece of process.stdin) given += piece;
await import(process.argv[2]);
listeners.status({ data: given });
const texts = Object.entries(elements).map(([id, one]) => [id, one.hidden ? null : one.textContent]);
console.log(JSON.stringify(Object.fromEntries(texts)));
"""


def draw(folder: Path, status: Status) -> dict[str, str | None]:
    """The text of every element by its id, None where it is hidden."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node.js")
    browser = folder / "browser.mjs"
    browser.write_text(BROWSER)
    script = folder / "page.mjs"
    shutil.copy(STATIC / "page.js", script)
    done = subprocess.run(
        [node, str(browser), str(script)],
        input=status.to_json(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    texts: dict[str, str | None] = json.loads(done.stdout)
    return texts


def test_a_status_is_drawn(status: Status, tmp_path: Path) -> None:
    texts = draw(tmp_path, status)
    assert texts["round"] == "Round 128" and texts["loss-range"] == "5.385 → 1.932"
    assert "otter" in str(texts["peers"]) and "gull" in str(texts["happenings"])


def test_what_members_have_measured_is_a_table_and_the_newest_a_tile(status: Status, tmp_path: Path) -> None:
    author = status.measured[0].name
    texts = draw(tmp_path, status)
    assert texts["measured"] == f"{author} 124 1.934 6.917 32,768 this peer 120 1.951 – 32,768"
    assert texts["unmeasured"] is None
    assert f"Held-out loss 1.934 nats a token, round 124, perplexity 6.917, measured by {author}" in str(texts["tiles"])
    texts = draw(tmp_path, replace(status, measured=()))
    assert texts["measured"] == "" and texts["unmeasured"] is not None
    assert "Held-out loss – not measured yet" in str(texts["tiles"])
