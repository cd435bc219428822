"""What the lab needs of the machine. A missing piece is named in one line, with what installs it: the skip's reason.

A user without root gets the same lab inside a user namespace of their own, where the kernel allows that (`unshare`):
`python -m tests.natlab.needs COMMAND…` runs a command there.
"""

import os
import shutil
import subprocess
import sys

TIMEOUT_S = 10.0
ENTER = ("unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
PROBE = "mount -t tmpfs tmpfs /run && ip netns add one && ip -n one link add probe0 type veth peer name probe1"
TABLE = "table ip probe { chain outgoing { type nat hook postrouting priority srcnat; masquerade fully-random; }; }"


def is_root() -> bool:
    return os.geteuid() == 0


def find_missing() -> str | None:
    """Why the lab cannot be built here, None if it can. The machine's own network is not touched to find out."""
    if shutil.which("ip") is None:
        return "needs iproute2: apt-get install -y iproute2"
    if shutil.which("nft") is None:
        return "needs nftables: apt-get install -y nftables"
    if shutil.which("unshare") is None:
        return "needs unshare: apt-get install -y util-linux"
    probe = f"{PROBE} && ip netns exec one nft '{TABLE}'"
    enter = ENTER if not is_root() else ("unshare", "--net", "--mount", "--propagation", "private")
    try:
        done = subprocess.run(
            [*enter, "sh", "-c", probe], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "needs network namespaces: trying them took too long"
    if done.returncode == 0:
        return None
    words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    who = "" if is_root() else "root, or a kernel that gives users "
    return f"needs {who}network namespaces with veth and NAT, and they cannot be had: {words[:200]}"


def main() -> None:
    """Becomes the command, as root of its own namespaces where the user is not root."""
    command = sys.argv[1:]
    if not is_root() and find_missing() is None:
        command = [*ENTER, "sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh", *command]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
