"""Stock vLLM and dplaunch side by side, on the same model in one run."""
