"""python -m eah"""

import sys

from eah.cli import main

sys.exit(main())
