from rnnlm.data import *
