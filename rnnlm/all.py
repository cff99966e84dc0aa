from rnnlm.stream import *
from rnnlm.text import *
from rnnlm.data import *
from rnnlm.models import *
from rnnlm.callback import *
from rnnlm.bptt import *
from rnnlm.learner import *
from rnnlm.train import *
