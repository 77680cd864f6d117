"""The rooms: each module here is one algorithm with a CPU and a CUDA kernel behind it."""
