"""`python -m videollama3` is the `videollama3` command."""

import sys

from .cli import main

sys.exit(main())
