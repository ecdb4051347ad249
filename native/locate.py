"""Print the folder that `#include <FILE>` starts from, for a file of an installed distribution.

python locate.py DISTRIBUTION FILE
"""

import importlib.metadata
import sys

distribution, file = sys.argv[1:]
for found in importlib.metadata.distribution(distribution).files or ():
    if str(found).endswith(file):
        print(str(found.locate().resolve())[: -len(file) - 1])
        break
else:
    sys.exit(1)
