"""Audio: frames of sound, as a domain of mamba2_apps."""
