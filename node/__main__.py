"""`python -m shoal.node` is `shoal`."""

import sys

from shoal.node.cli import main

sys.exit(main())
