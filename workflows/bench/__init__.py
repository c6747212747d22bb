"""Speed of one UNet step inside ComfyUI: DHA against the unpatched model and against its peers, in one process."""
