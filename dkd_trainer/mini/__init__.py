"""Mini SD-2.1: a real, narrow Stable Diffusion 2.1 trained on emoji art, to try and test everything offline."""
