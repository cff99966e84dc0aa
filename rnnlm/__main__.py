import sys
from rnnlm.train import demo

sys.exit(demo())
