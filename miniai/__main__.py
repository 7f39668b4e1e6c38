import sys
from miniai.cli import main

sys.exit(main())
