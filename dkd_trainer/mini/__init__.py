"""Mini SD-2.1: a real, narrow Stable Diffusion 2.1 trained on emoji art, so that everything can be tried and tested offline."""
