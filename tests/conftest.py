import os

# The models here are so small that threads gain nothing, and on busy cores they wait for each other most of the time.
os.environ.setdefault('OMP_NUM_THREADS', '1')

# The benchmarks are run to see that they run, on small data; the table of 03_bptt is made from one seed instead of three.
os.environ.setdefault('RNNLM_BENCH', 'small')
