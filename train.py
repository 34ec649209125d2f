#!/usr/bin/env python
"""Train or validate an image classifier of the zoo (or any of timm's): ``python train.py --help``, docs/training.md."""

import sys

from visionattn.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
