"""Training: stages, their losses, the loop, and all that makes it safe to stop and to go on."""
