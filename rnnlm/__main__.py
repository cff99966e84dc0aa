from rnnlm.train import demo

demo()
