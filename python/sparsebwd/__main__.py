# SPDX-License-Identifier: Apache-2.0
from sparsebwd_command import main

if __name__ == "__main__":
    main("python -m sparsebwd")
