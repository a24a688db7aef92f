"""``python -m mprec`` is the ``mprec`` command."""

import sys

from mprec.cli import main

sys.exit(main())
