import sys
from rnnlm.cli import demo

sys.exit(demo())
