import sys

from par_diffusers.cli import main


sys.exit(main())
