"""dplaunch beside stock vLLM on NVIDIA devices: many cases in one call, each checked. See docs/gpu.md."""
