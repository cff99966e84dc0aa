from rnnlm.data import *
from rnnlm.models import *
from rnnlm.callback import *
from rnnlm.train import *
