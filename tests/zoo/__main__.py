# SPDX-License-Identifier: Apache-2.0
import sys

from .run import main

if __name__ == "__main__":  # not in the processes that it starts
    sys.exit(main(sys.argv[1:]))
