"""``python -m msdd_fast`` is the same as ``msdd-fast``."""

import sys

from msdd_fast.commands.main import main

sys.exit(main())
