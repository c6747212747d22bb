"""Example graphs, and what drives a real ComfyUI with them."""
