"""The demo: original and student side by side in a real ComfyUI, from one command."""
