"""Training of frequency controls: a branch that lets one band of a source picture steer a locked SD-2.x."""
