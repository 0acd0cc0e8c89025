"""`make bench-gpu`: what the engines do on this machine's GPU, beside PyTorch and the hardware's limits."""
