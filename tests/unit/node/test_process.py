"""What every process of ours begins with: it may be told to end with whoever started it."""

import subprocess
import sys

CHILD = """
import signal
from shoal.node.process import leave_with_stdin
print("it is up", flush=True)
leave_with_stdin()
while True:
    signal.pause()
"""
PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE).wait()
"""
LOADED = """
import gc
from shoal.node.process import keep_all_objects, look_for_garbage_seldom
look_for_garbage_seldom()
collected = []
gc.callbacks.append(lambda phase, info: collected.append(phase))
kept = [[] for _ in range(10_000)]
print(len(collected), end=" ")
keep_all_objects()
print(len(gc.get_objects()) < len(kept))
"""


def test_what_the_start_leaves_is_not_looked_at_again_and_again() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout == "0 True\n"


def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"it is up\n"
    parent.kill()
    # The child has the other end of this pipe: it is closed when that one is gone, too.
    rest, _ = parent.communicate(timeout=60)
    assert (rest, parent.returncode) == (b"", -9)


def test_it_leaves_as_after_sigterm_and_only_when_its_input_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == b"it is up\n"
        child.stdin.write(b"a word\n")
        child.stdin.flush()
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(60) == -15
