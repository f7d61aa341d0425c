"""Less time or memory for the same results: sampler.py (a cache), fast.py (torch.compile), graphs.py (CUDA graphs)."""
